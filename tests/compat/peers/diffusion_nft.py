"""The step functions of DiffusionNFT's solver, written from MATH.md."""

import math

import torch
from diffusers.utils import torch_utils


def flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator=None):
    device = model_output.device
    s, n = sigmas[index].to(device), sigmas[index + 1].to(device)
    dt = n - s
    level = torch.sqrt(s / (1 - torch.where(s == 1, sigmas[1].to(device), s))) * eta
    tau = level * torch.sqrt(-dt)
    mean = latents * (1 + level**2 / (2 * s) * dt) + model_output * (1 + level**2 * (1 - s) / (2 * s)) * dt
    if prev_sample is None:
        prev_sample = mean + tau * torch_utils.randn_tensor(
            model_output.shape, generator=generator, device=device, dtype=model_output.dtype
        )
    log_prob = -((prev_sample.detach() - mean) ** 2) / (2 * tau**2) - torch.log(tau) - 0.5 * math.log(2 * math.pi)
    return prev_sample, latents - s * model_output, log_prob.flatten(1).mean(dim=1)


def dance_grpo_step(model_output, latents, eta, sigmas, index, prev_sample):
    s, n = sigmas[index], sigmas[index + 1]
    clean = latents - s * model_output
    score = -(latents - clean * (1 - s)) / s**2
    mean = latents + (n - s) * model_output + -0.5 * eta**2 * score * (n - s)
    tau = eta * math.sqrt(s - n)
    if prev_sample is None:
        prev_sample = mean + torch.randn_like(mean) * tau
    wide = torch.promote_types(mean.dtype, torch.float32)
    off = prev_sample.detach().to(wide) - mean.to(wide)
    return prev_sample, clean, (-(off**2) / (2 * tau**2)).flatten(1).mean(dim=1)
