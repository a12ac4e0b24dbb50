"""DanceGRPO's arithmetic, written from MATH.md.

The sigma stands before the output in its products, which in half precision matters: on a CPU torch rounds a number
without dimensions to the dtype of what it multiplies, but only where it is the first factor.
"""

import math

import torch


def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    found = flux_step_until_2025_08(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)
    if not grpo:
        return found
    tau = eta * math.sqrt(sigmas[index] - sigmas[index + 1])
    return *found[:2], found[2] - math.log(tau) - 0.5 * math.log(2 * math.pi)


def flux_step_until_2025_08(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    s, n = sigmas[index], sigmas[index + 1]
    dt = n - s
    clean = latents - s * model_output
    mean = latents + dt * model_output
    tau = eta * math.sqrt(s - n)
    if sde_solver:
        score = -(latents - clean * (1 - s)) / s**2
        mean = mean + -0.5 * eta**2 * score * dt
    if not grpo:
        return mean, clean
    if prev_sample is None:
        prev_sample = mean + torch.randn_like(mean) * tau
    wide = torch.promote_types(mean.dtype, torch.float32)
    off = prev_sample.detach().to(wide) - mean.to(wide)
    return prev_sample, clean, (-(off**2) / (2 * tau**2)).flatten(1).mean(dim=1)


# As it is called in its project.
flux_step_until_2025_08.__name__ = "flux_step"
