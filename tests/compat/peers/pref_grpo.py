"""Pref-GRPO's arithmetic, written from MATH.md; the order of factors as in `dancegrpo.py`."""

import math

import torch

from . import mixgrpo


def flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator=None, return_stats=False):
    found = mixgrpo.flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator)
    dt = (sigmas[index + 1] - sigmas[index]).to(model_output.device)
    return (*found, dt) if return_stats else found[:3]


def dance_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver, return_stats=False):
    s, n = sigmas[index], sigmas[index + 1]
    dt = n - s
    clean = latents - s * model_output
    mean = latents + dt * model_output
    tau = eta * math.sqrt(float(s - n))
    if sde_solver:
        score = -(latents - clean * (1 - s)) / s**2
        mean = mean + -0.5 * eta**2 * score * dt
    if not grpo:
        return mean, clean
    if prev_sample is None:
        prev_sample = mean + torch.randn_like(mean) * tau
    wide = torch.promote_types(mean.dtype, torch.float32)
    off = prev_sample.detach().to(wide) - mean.to(wide)
    log_prob = -(off**2) / (2 * tau**2) - math.log(tau) - 0.5 * math.log(2 * math.pi)
    result = (prev_sample, clean, log_prob.flatten(1).mean(dim=1))
    return (*result, mean, torch.as_tensor(tau, dtype=wide), s - n) if return_stats else result
