"""The step and the loss in plain torch, in the arithmetic that training scripts use today (DanceGRPO's `flux_step`)."""

import math

import torch
from torch import Tensor


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int,
    prev_sample: Tensor | None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One Dance-SDE step, or the score of `prev_sample`: next latents, the estimate of x0, log-probability `[B]`.

    The scripts take `math.sqrt` of a tensor, which breaks a compiled graph; here the root stays in torch.
    """
    sigma = sigmas[index]
    dsigma = sigmas[index + 1] - sigma
    mean = latents + dsigma * model_output
    denoised = latents - sigma * model_output
    std = eta * torch.sqrt(-dsigma)
    score = -(latents - denoised * (1 - sigma)) / sigma**2
    log_term = -0.5 * eta**2 * score
    mean = mean + log_term * dsigma
    if prev_sample is None:
        prev_sample = mean + (torch.randn_like(mean) if noise is None else noise) * std
    log_prob = (
        -((prev_sample.detach().to(torch.float32) - mean.to(torch.float32)) ** 2) / (2 * std**2)
        - torch.log(std)
        - math.log(math.sqrt(2 * math.pi))
    )
    return prev_sample, denoised, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def policy_loss(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int,
    next_latents: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float,
    advantage_clip: float,
) -> Tensor:
    """The clipped ratio loss of one denoising step."""
    log_prob = flux_step(model_output, latents, eta, sigmas, index, next_latents)[2]
    advantages = torch.clamp(advantages, -advantage_clip, advantage_clip)
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return torch.mean(torch.maximum(unclipped, clipped))
