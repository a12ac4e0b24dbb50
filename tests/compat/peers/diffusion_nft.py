"""The step functions of DiffusionNFT's solver: those of two other projects, with fewer choices."""

from . import mixgrpo, pref_grpo


def flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator=None):
    return pref_grpo.flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator)


def dance_grpo_step(model_output, latents, eta, sigmas, index, prev_sample):
    return mixgrpo.dance_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, True, True)
