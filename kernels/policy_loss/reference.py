"""Plain torch definition of the clipped policy loss on `[B]` numbers; the pass over the latents is the transition's."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..transition import reference as transition

METRICS = 8


@dataclass(frozen=True)
class PolicyTerms:
    """Everything the loss gives back, and the coefficients of its gradient (float64 `[B]`)."""

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    metrics: Tensor
    step_scale: Tensor
    pull_scale: Tensor


def policy_loss(
    latents: Tensor,
    output: Tensor,
    next_latents: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    rows: Tensor,
    rounding_dtype: torch.dtype | None,
    old_log_prob: Tensor,
    advantages: Tensor,
    weight: Tensor | None,
    reference_output: Tensor | None,
    old_output: Tensor | None,
    clip_low: float,
    clip_high: float,
    advantage_clip: float,
    kl_weight: float,
    ratio_norm: bool,
) -> PolicyTerms:
    """Clipped ratio loss with optional KL to a reference output and RatioNorm (MATH: objective)."""
    dtype = rows.dtype
    velocity = transition.guided(output, uncond, guidance_scale, dtype)
    mean, _ = transition.mean_and_denoised(latents, velocity, rows, rounding_dtype)
    log_prob = transition.log_prob(next_latents.to(dtype) - mean, rows)
    scale, b, tau = (rows[:, i].double() for i in (transition.SCALE, transition.B, transition.TAU))
    numel, batch = latents[0].numel(), len(latents)

    log_ratio = log_prob.double() - old_log_prob.double()
    weight = torch.ones_like(log_ratio) if weight is None else weight.double()
    slope, policy_weight = torch.ones_like(weight), weight
    if ratio_norm and old_output is not None:
        old_mean, _ = transition.mean_and_denoised(latents, old_output.to(dtype), rows, rounding_dtype)
        log_ratio = (log_ratio - scale * transition.sample_mean((mean - old_mean).square())) * tau
        slope, policy_weight = tau, weight / rows[:, transition.STEP_SIZE].double()
    advantage = advantages.double().clamp(-advantage_clip, advantage_clip)
    silent = weight == 0
    # A row without noise has no ratio, one outside the table (NaN) has nothing: neither may pass for a right one.
    missing = ~silent & ~(scale < 0)
    ratio = torch.where(missing, math.nan, log_ratio.exp())
    # An advantage of 0 gives 0 even where the ratio has overflown.
    unclipped = torch.where((advantage == 0) & ~missing, 0.0, -advantage * ratio)
    bounded = -advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipped = bounded > unclipped
    term = torch.where(clipped, bounded, unclipped)
    kl = torch.zeros_like(term)
    if reference_output is not None:
        kl = -scale * b.square() * transition.sample_mean((velocity - reference_output.to(dtype)).square())
    # Whatever a term of weight 0 holds, infinities included, it must not reach the others.
    pulled = weight * kl_weight * kl if kl_weight != 0 else torch.zeros_like(kl)
    loss = torch.where(silent, 0.0, policy_weight * term + pulled).sum() / batch

    grad_log_ratio = torch.where(clipped | silent, 0.0, unclipped)
    step_scale = policy_weight / batch * grad_log_ratio * slope * transition.log_prob_slope(rows, numel)
    pull_scale = weight / batch * kl_weight * -2.0 * scale * b.square() / numel

    counted = (~silent).double()
    samples = counted.sum()

    def average(values: Tensor) -> Tensor:
        return torch.where(counted > 0, values.double(), 0.0).sum() / samples.clamp(min=1.0)

    deviation = torch.where(counted > 0, (ratio - 1.0).abs(), 0.0).amax()
    metrics = torch.stack(
        [
            samples,
            average(clipped),
            average(advantage != advantages.double()),
            average(ratio),
            deviation,
            average(ratio - 1.0 - log_ratio),
            average(kl),
            average(term),
        ]
    )
    return PolicyTerms(loss.to(dtype), log_prob, ratio.to(dtype), metrics.to(dtype), step_scale, pull_scale)
