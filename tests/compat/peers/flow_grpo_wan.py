"""The steps of Flow-GRPO's Wan scripts and of its first SD3 scripts, written from MATH.md."""

import math

import torch
from diffusers.utils import torch_utils


def sde_step_with_logprob(
    self,
    model_output,
    timestep,
    sample,
    prev_sample=None,
    generator=None,
    determistic=False,
    return_pixel_log_prob=False,
    return_dt_and_std_dev_t=False,
):
    wide = torch.promote_types(sample.dtype, torch.float32)
    top, bottom = float(self.sigmas[1]), float(self.sigmas[-1])
    found, std, root = _step(
        self,
        model_output.to(wide),
        timestep,
        sample.to(wide),
        None if prev_sample is None else prev_sample.to(wide),
        generator,
        determistic,
        lambda s: bottom + (top - bottom) * s,
    )
    return (*found, std, root) if return_dt_and_std_dev_t else (*found, std * root)


def sde_step_2025_05(self, model_output, timestep, sample, prev_sample=None, generator=None, determistic=False):
    def level(s):
        return torch.sqrt(s / (1 - torch.where(s == 1, self.sigmas[1], s))) * 0.7

    found, std, root = _step(self, model_output, timestep, sample, prev_sample, generator, determistic, level)
    return *found, std * root


def _step(self, v, timestep, x, prev_sample, generator, determistic, level):
    steps = [self.index_for_timestep(t) for t in timestep]
    shape = (-1, *(1,) * (x.ndim - 1))
    s, n = self.sigmas[steps].view(shape), self.sigmas[[i + 1 for i in steps]].view(shape)
    dt = n - s
    std, root = level(s), torch.sqrt(-dt)
    mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
    if prev_sample is None:
        noise = torch_utils.randn_tensor(v.shape, generator=generator, device=v.device, dtype=v.dtype)
        prev_sample = mean + std * root * noise
    if determistic:
        prev_sample = x + dt * v
    log_prob = -((prev_sample.detach() - mean) ** 2) / (2 * (std * root) ** 2)
    log_prob = log_prob - torch.log(std * root) - 0.5 * math.log(2 * math.pi)
    return (prev_sample, log_prob.flatten(1).mean(dim=1), mean), std, root


# As it is called in its project.
sde_step_2025_05.__name__ = "sde_step_with_logprob"
