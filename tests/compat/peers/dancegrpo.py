"""DanceGRPO's arithmetic, written from MATH.md.

The scripts write `sigma * model_output` with a sigma on the CPU. On a GPU that multiplies in float32 and rounds the
product; on a CPU torch does so only for `model_output * sigma`, and rounds the sigma otherwise.
"""

import math

import torch


def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    s, n = sigmas[index], sigmas[index + 1]
    dt = n - s
    clean = latents - model_output * s
    mean = latents + model_output * dt
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
