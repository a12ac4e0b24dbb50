"""Pref-GRPO's steps (CodeGoat24/Pref-GRPO, `fastvideo/grpo/steps.py`).

>>> import torch
>>> from dancegrpo_fast.compat.pref_grpo import flow_grpo_step
>>> latents, output, sigmas = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.linspace(1, 0, 9)
>>> after, x0, log_prob = flow_grpo_step(output, latents, 0.7, sigmas, 2, None)
>>> bool((flow_grpo_step(output, latents, 0.7, sigmas, 2, after)[2] == log_prob).all())
True
"""

from typing import Any

import torch
from torch import Tensor

from ._common import How
from ._grpo import Found, dance_mean, dance_step, flow_step


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Any = None,
    return_stats: bool = False,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """One Flow-SDE step, or the score of `prev_sample`.

    Args:
        model_output, latents, eta, sigmas, index, prev_sample, rounding, backend, latents_dtype: as for
            `dancegrpo.flux_step`.
        generator: what to draw the noise from, with diffusers' `randn_tensor`, in the model output's dtype.
        return_stats: also give the statistics.

    Returns:
        `(prev_sample, x0, log_prob)`, with statistics `+ (mean, std, dt)`: `mean` is differentiable in
        `model_output`, `std` includes `sqrt(-dt)`, and `dt` is negative; both without dimensions.

    Raises:
        ValueError: bad input, by argument.
    """
    how = How(rounding, backend, latents_dtype)
    step = model_output, latents, eta, sigmas, index, prev_sample, generator
    found = flow_step(*step, how, with_mean=return_stats)
    return _tuple(found, 1.0 if return_stats else None)


def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    return_stats: bool = False,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """`dancegrpo.flux_step` with the Gaussian's constants in the score.

    With `return_stats` and `grpo` it returns `+ (mean, std, -dt)`; this step size is positive, unlike
    `flow_grpo_step`'s.
    """
    if not grpo:
        return dance_mean(model_output, latents, eta, sigmas, index, sde_solver, rounding)
    how = How(rounding, backend, latents_dtype)
    step = model_output, latents, eta, sigmas, index, prev_sample, sde_solver
    found = dance_step(*step, how, normalized=True, noisy_ode=True, with_mean=return_stats)
    return _tuple(found, -1.0 if return_stats else None)


def _tuple(found: Found, sign: float | None) -> tuple[Tensor, ...]:
    if sign is None:
        return found.three
    assert found.outcome.mean is not None
    return (*found.three, found.outcome.mean, found.statistic("tau"), sign * found.statistic("dt"))
