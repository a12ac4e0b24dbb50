"""DanceGRPO's step (XueZeyue/DanceGRPO, `fastvideo/train_grpo_flux.py` and the other flow scripts).

>>> import torch
>>> from dancegrpo_fast.compat.dancegrpo import flux_step
>>> latents, output, sigmas = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.linspace(1, 0, 9)
>>> after, x0, log_prob = flux_step(output, latents, 0.3, sigmas, 2, None, True, True)
>>> bool((flux_step(output, latents, 0.3, sigmas, 2, after, True, True)[2] == log_prob).all())
True
"""

from typing import Any

import torch
from torch import Tensor

from ._common import How
from ._grpo import dance_mean, dance_step


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
    normalized: bool = True,
) -> tuple[Tensor, ...]:
    """One Dance-SDE step, or the score of `prev_sample`.

    Args:
        model_output: `[B, ...]`, the velocity, any float dtype; the log-probability is differentiable in it alone.
        latents: `[B, ...]`, float32 in the scripts.
        eta: noise level; 0 takes the Euler step and scores 0.
        sigmas: `[T + 1]`, strictly decreasing within [0, 1], on any device; read once.
        index: step, an int or an int64 tensor without dimensions on any device.
        prev_sample: next latents to score; None draws them from torch's default generator, as `randn_like`.
        grpo: False gives the mean without noise or score.
        sde_solver: False leaves the score term out of the mean; the noise stays.
        rounding: "exact", or "reference" for the published order of operations, and its roundings in half precision.
        backend: as for `transition_step`.
        latents_dtype: what the script keeps its latents in; next latents that are drawn are rounded to it before they
            are scored, and returned in the dtype as before.
        normalized: with the Gaussian's constants, as published since 2025-08-28; until then they were dropped.

    Returns:
        `(prev_sample, x0, log_prob)`, or `(mean, x0)` where `grpo` is False. `log_prob` is float32 `[B]`.
        `prev_sample` has no gradient.

    Raises:
        ValueError: bad input, by argument.
    """
    if not grpo:
        return dance_mean(model_output, latents, eta, sigmas, index, sde_solver, rounding)
    how = How(rounding, backend, latents_dtype)
    step = model_output, latents, eta, sigmas, index, prev_sample, sde_solver
    return dance_step(*step, how, normalized=normalized, noisy_ode=True).three


def flux_step_with_ddpo(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    ddpo: bool,
    sde_solver: bool,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
    normalized: bool = True,
) -> tuple[Tensor, ...]:
    """`flux_step` of forks that call `grpo` `ddpo`."""
    options: dict[str, Any] = {"backend": backend, "latents_dtype": latents_dtype, "normalized": normalized}
    return flux_step(
        model_output, latents, eta, sigmas, index, prev_sample, ddpo, sde_solver, rounding=rounding, **options
    )
