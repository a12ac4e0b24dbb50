"""One step from sigmas that are tensors: its coefficients are computed where those are.

A `TransitionTable` is built on the host; an engine that hands out sigmas of a device one by one would have to wait.
"""

import math

import torch
from torch import Tensor

from ..kernels.transition import reference
from ..ops.transition import empty_like, scored, step_op


def rows(kind: str, sigma: Tensor, sigma_next: Tensor, level: float, sigma_max: float | Tensor) -> Tensor:
    """What a `TransitionTable` packs for these steps, float32 `[1 or B, 11]`.

    Args:
        kind: "flow", "dance" or "cps", as `transitions` has them.
        sigma, sigma_next: `[1]` or `[B]`, rounded to float32 first.
        level: eta, above 0; for "cps" at most 1.
        sigma_max: what stands for a sigma of 1 under the root of "flow".
    """
    # From here on as `transitions` does.
    s, n = (value.reshape(-1).float().double() for value in (sigma, sigma_next))
    eta, dt = torch.full_like(s, level), n - s
    if kind == "cps":
        kept, tau = n * math.cos(level * math.pi / 2.0), n * math.sin(level * math.pi / 2.0)
        a, b = (1.0 - n) + kept, -s * (1.0 - n) + kept * (1.0 - s)
    else:
        if kind == "flow":
            top = torch.as_tensor(sigma_max, device=s.device).float().double()
            eta = eta * torch.sqrt(s / (1.0 - torch.where(s == 1.0, top, s)))
        pull = eta.square() * dt / (2.0 * s.square())
        a, b, tau = 1.0 + pull * s, dt + pull * s * (1.0 - s), eta * torch.sqrt(-dt)
    noisy = tau > 0
    spread = torch.where(noisy, tau, 1.0)
    scale, constant = -torch.ones_like(tau), torch.zeros_like(tau)
    if kind != "cps":
        scale = -0.5 / spread.square()
        constant = -torch.log(spread) - 0.5 * math.log(2.0 * math.pi)
    named = {
        reference.A: a,
        reference.B: b,
        reference.TAU: tau,
        reference.P: torch.ones_like(s),
        reference.Q: -s,
        reference.SCALE: torch.where(noisy, scale, 0.0),
        reference.CONSTANT: torch.where(noisy, constant, 0.0),
        reference.STEP_SIZE: -dt,
    }
    # The other columns are for `rounding="reference"` alone.
    columns = [named.get(i, torch.zeros_like(s)) for i in range(reference.STEP_SIZE + 1)]
    return torch.stack(columns, dim=1).float()


def transition(
    latents: Tensor, output: Tensor, packed: Tensor, next_latents: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next latents, their score and the mean.

    Args:
        latents: float32, bfloat16 or float16 `[B, ...]`.
        output: float32 `[B, ...]`; score and mean are differentiable in it alone.
        packed: of `rows`.
        next_latents: what to score, as it is; None samples, and rounds to the latents' dtype before scoring.
        noise: float32 `[B, ...]`, for sampling.

    Returns:
        float32 `[B, ...]`, `[B]`, `[B, ...]`.
    """
    latents = latents.detach()
    each = None if len(packed) == 1 else torch.arange(len(packed), device=latents.device)
    settings = (None, 1.0, packed, each, 0, False, "auto")
    log_prob = None
    if next_latents is None:
        after = empty_like(latents, latents.dtype)
        with torch.no_grad():
            log_prob, _ = step_op(latents, output.detach(), after, *settings, noise, None, None, False)
    else:
        after = next_latents.detach()
    after = after.float()
    if log_prob is None or (torch.is_grad_enabled() and output.requires_grad):
        log_prob = scored(latents, output, after, *settings)
    mean, _ = reference.mean_and_denoised(latents, output, packed, None)
    return after, log_prob, mean
