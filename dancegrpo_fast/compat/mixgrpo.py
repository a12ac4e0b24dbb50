"""MixGRPO's steps (Tencent-Hunyuan/MixGRPO, `fastvideo/utils/sampling_utils.py`).

>>> import torch
>>> from dancegrpo_fast.compat.mixgrpo import flow_grpo_step
>>> latents, output, sigmas = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.linspace(1, 0, 9)
>>> after, x0, log_prob, mean, std = flow_grpo_step(output, latents, 0.7, sigmas, 2, None)
>>> bool((flow_grpo_step(output, latents, 0.7, sigmas, 2, after)[2] == log_prob).all())
True
"""

from typing import Any

import torch
from torch import Tensor

from ._common import How
from ._grpo import dance_mean, dance_step, flow_step


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Any = None,
    determistic: bool = False,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One Flow-SDE step, or the score of `prev_sample`.

    Args:
        model_output, latents, eta, sigmas, index, rounding, backend, latents_dtype: as for `dancegrpo.flux_step`.
        prev_sample: next latents to score; None draws noise of the model output's shape and dtype.
        generator: what to draw it from, with diffusers' `randn_tensor`.
        determistic: take the Euler step, whatever `prev_sample` is, and score it as a sample of the SDE; without
            `prev_sample` the noise is drawn all the same.

    Returns:
        `(prev_sample, x0, log_prob, mean, std)`; `mean` is differentiable in `model_output`, `std` is that of the
        noise, `sqrt(-dt)` included, without dimensions.

    Raises:
        ValueError: both `prev_sample` and `generator`, or bad input, by argument.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: got one together with prev_sample, want one of them")
    how = How(rounding, backend, latents_dtype)
    step = model_output, latents, eta, sigmas, index, prev_sample, generator
    found = flow_step(*step, how, deterministic=determistic, with_mean=True)
    assert found.outcome.mean is not None
    return *found.three, found.outcome.mean, found.statistic("tau")


def dance_grpo_step(
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
) -> tuple[Tensor, ...]:
    """`dancegrpo.flux_step`, except for two things.

    Without `sde_solver` nothing is drawn: the next latents are the mean. The log-probability lacks the Gaussian's
    constants, as in the solver of DiffusionNFT, which has no `grpo` and `sde_solver`: both are True there.
    """
    if not grpo:
        return dance_mean(model_output, latents, eta, sigmas, index, sde_solver, rounding)
    how = How(rounding, backend, latents_dtype)
    step = model_output, latents, eta, sigmas, index, prev_sample, sde_solver
    return dance_step(*step, how, normalized=False, noisy_ode=False).three
