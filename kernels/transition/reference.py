"""Plain torch definition of the transition ops, for any float dtype and device: what the kernels are judged by."""

import math

import torch
from torch import Tensor

# Packed columns, as in math.h.
A, B, TAU, P, Q, SCALE, CONSTANT, DRIFT, DRIFT_WEIGHT, DENOISED_WEIGHT, STEP_SIZE = range(11)
_WORD = 0xFFFFFFFF


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def table_rows(table: Tensor, step: Tensor | None, step_index: int, batch: int) -> Tensor:
    """Each sample's row: `[B, 11]`."""
    return table[step] if step is not None else table[step_index].expand(batch, -1)


def column(rows: Tensor, index: int, like: Tensor) -> Tensor:
    """One coefficient per sample, broadcastable over the sample's elements."""
    return rows[:, index].reshape(-1, *(1,) * (like.ndim - 1))


def guided(output: Tensor, uncond: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """Classifier-free guidance `u + w (c - u)` in the compute dtype."""
    cond = output.to(dtype)
    return cond if uncond is None else uncond.to(dtype) + scale * (cond - uncond.to(dtype))


def mean_and_denoised(
    latents: Tensor, velocity: Tensor, rows: Tensor, rounding_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Mean of the step and the estimate of x0; with `rounding_dtype` the products with the output are rounded to it."""
    x = latents.to(velocity.dtype)

    def c(index: int) -> Tensor:
        return column(rows, index, x)

    if rounding_dtype is None:
        return c(A) * x + c(B) * velocity, c(P) * x + c(Q) * velocity
    drift = (c(DRIFT) * velocity).to(rounding_dtype).to(x.dtype)
    denoised = (c(Q) * velocity).to(rounding_dtype).to(x.dtype)
    return c(A) * x + c(DRIFT_WEIGHT) * drift + c(DENOISED_WEIGHT) * denoised, c(P) * x + denoised


def sample_mean(values: Tensor) -> Tensor:
    """Mean over everything but the batch, summed in float64: `[B]`."""
    return values.flatten(1).to(torch.float64).mean(dim=1)


def log_prob(difference: Tensor, rows: Tensor) -> Tensor:
    """`scale mean(d^2) + constant` per sample."""
    scale, constant = rows[:, SCALE].double(), rows[:, CONSTANT].double()
    # A row without noise scores its constant, 0, however large the difference is.
    score = torch.where(scale == 0, constant, scale * sample_mean(difference.square()) + constant)
    return score.to(difference.dtype)


def _philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def normals(seed: int, sample_ids: Tensor, steps: Tensor, numel: int) -> Tensor:
    """Philox 4x32-10 + Box-Muller keyed by (seed, sample id, step, element): float32 `[B, numel]`.

    The kernels, whose logarithm and sine are float32 polynomials, draw the same numbers within four units in the last
    place.
    """
    blocks = torch.arange((numel + 3) // 4, dtype=torch.int64, device=sample_ids.device)
    shape = (len(sample_ids), len(blocks))
    ids = sample_ids.to(torch.int64)[:, None].expand(shape)
    counter = [blocks.expand(shape), steps.to(torch.int64)[:, None].expand(shape), ids & _WORD, (ids >> 32) & _WORD]
    words = _philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    parts = []
    for radius_word, angle_word in (words[:2], words[2:]):
        uniform = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
        radius = torch.sqrt(-2.0 * torch.log(uniform.double()))
        angle = angle_word.double() * (2.0 * math.pi * 2.0**-32)
        parts += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :numel].float()


def step(
    latents: Tensor,
    output: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    rows: Tensor,
    noise: Tensor | None,
    out_dtype: torch.dtype,
    rounding_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Next latents in `out_dtype`, their log-probability as stored, and the estimate of x0 in the compute dtype."""
    velocity = guided(output, uncond, guidance_scale, rows.dtype)
    mean, denoised = mean_and_denoised(latents, velocity, rows, rounding_dtype)
    sampled = mean
    if noise is not None:
        tau = column(rows, TAU, mean)
        sampled = torch.where(tau > 0, mean + tau * noise.to(mean.dtype), mean)
    stored = sampled.to(out_dtype)
    return stored, log_prob(stored.to(mean.dtype) - mean, rows), denoised


def score(
    latents: Tensor,
    output: Tensor,
    next_latents: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    rows: Tensor,
    rounding_dtype: torch.dtype | None,
) -> Tensor:
    """Log-probability of given next latents: `[B]`."""
    velocity = guided(output, uncond, guidance_scale, rows.dtype)
    mean, _ = mean_and_denoised(latents, velocity, rows, rounding_dtype)
    return log_prob(next_latents.to(mean.dtype) - mean, rows)


def log_prob_slope(rows: Tensor, numel: int) -> Tensor:
    """d log_prob / d v over `x' - mean`, float64 `[B]`."""
    return -2.0 * rows[:, SCALE].double() * rows[:, B].double() / numel


def _scaled(scale: Tensor, values: Tensor) -> Tensor:
    """`scale[b] values[b]`, and 0 where the scale is, even for values that are not finite: it is not read."""
    factor = scale.to(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))
    return torch.where(factor == 0, 0.0, factor * values)


def gradient(
    latents: Tensor,
    output: Tensor,
    next_latents: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    rows: Tensor,
    rounding_dtype: torch.dtype | None,
    step_scale: Tensor,
    pull_scale: Tensor | None = None,
    pull: Tensor | None = None,
    mean_output: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`step_scale (x' - mean) + pull_scale (v - pull)`, then the chain rule of guidance, in the outputs' dtypes."""
    velocity = guided(output, uncond, guidance_scale, rows.dtype)
    through = velocity if mean_output is None else mean_output.to(rows.dtype)
    mean, _ = mean_and_denoised(latents, through, rows, rounding_dtype)
    grad = _scaled(step_scale, next_latents.to(mean.dtype) - mean)
    if pull is not None and pull_scale is not None:
        grad = grad + _scaled(pull_scale, velocity - pull.to(rows.dtype))
    if uncond is None:
        return grad.to(output.dtype), None
    return (guidance_scale * grad).to(output.dtype), ((1.0 - guidance_scale) * grad).to(uncond.dtype)
