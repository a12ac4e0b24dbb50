"""The two steps that DanceGRPO, MixGRPO and Pref-GRPO share, before each returns its own tuple."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice
from ._common import (
    How,
    Outcome,
    Sampler,
    advance,
    as_step,
    exact_denoised,
    exact_mean,
    noise_like,
    noise_like_sum,
    result_dtype,
    stored,
    times,
    widened,
)
from ._samplers import Kind


class Found(NamedTuple):
    """What the projects choose their tuples from, and where to read the statistics."""

    outcome: Outcome
    sampler: Sampler
    step: int | Tensor
    rounding: str

    @property
    def three(self) -> tuple[Tensor, Tensor, Tensor]:
        """Next latents, estimate of x0, log-probability."""
        assert self.outcome.denoised is not None
        return self.outcome.next_latents, self.outcome.denoised, self.outcome.log_prob

    def statistic(self, name: str) -> Tensor:
        """A column of the sampler at the step, float32 without dimensions."""
        return self.sampler.statistic(name, self.step, (), self.outcome.next_latents.device, self.rounding)


def dance_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    sde_solver: bool,
    how: How,
    *,
    normalized: bool,
    noisy_ode: bool,
    with_mean: bool = False,
) -> Found:
    """Dance-SDE, or without `sde_solver` the Euler mean, to which `noisy_ode` still adds the noise."""
    sampler = _dance(sigmas, eta, sde_solver, normalized)
    step = as_step("index", index, len(sampler.table), latents)
    dtype = result_dtype(latents, model_output)
    if prev_sample is None and not sde_solver and not noisy_ode:
        euler = _dance(sigmas, 0.0, False, normalized)
        prev_sample = advance(latents, model_output, euler, step, None, lambda: None, how, out_dtype=dtype).next_latents

    def draw() -> Tensor:
        return noise_like_sum(latents, model_output)

    call = latents, model_output, sampler, step, prev_sample, draw, how
    return Found(advance(*call, out_dtype=dtype, mean=with_mean, denoised=True), sampler, step, how.rounding)


def dance_mean(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    sde_solver: bool,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """The mean and the estimate of x0, without noise or score: what the scripts call with `grpo=False`."""
    check_choice("rounding", rounding, ("exact", "reference"))
    sampler = _dance(sigmas, eta, sde_solver, True)
    step = as_step("index", index, len(sampler.table), latents)
    if rounding == "reference":
        row, x = sampler.rows(step, latents), latents.detach()
        clean = x - times(row("sigma"), model_output, sampler.published.on_cpu)
        return sampler.published.mean(x, model_output, row), clean
    dtype = result_dtype(latents, model_output)
    x = widened(latents, model_output)
    mean = exact_mean(x, model_output, sampler, step, dtype)
    return mean, exact_denoised(x, model_output, sampler, step, dtype)


def _dance(sigmas: Tensor, eta: float, sde: bool, normalized: bool) -> Sampler:
    return Kind("dance", eta, normalized=normalized, sde=sde, exact_noise=True).over("sigmas", sigmas)


def flow_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Any,
    how: How,
    *,
    deterministic: bool = False,
    with_mean: bool = False,
) -> Found:
    """Flow-SDE; `deterministic` draws the noise and then takes the Euler step, scored as a sample of the SDE."""
    sampler = Kind("flow", eta).over("sigmas", sigmas)
    step = as_step("index", index, len(sampler.table), latents)
    dtype = result_dtype(latents, model_output)

    def draw() -> Tensor:
        return noise_like(model_output, generator, model_output.dtype)

    if deterministic:
        if prev_sample is None:
            draw()  # the peer's generator moves on, too
        prev_sample = euler_step(latents, model_output, sigmas, step, how, dtype)
    call = latents, model_output, sampler, step, prev_sample, draw, how
    return Found(advance(*call, out_dtype=dtype, mean=with_mean, denoised=True), sampler, step, how.rounding)


def euler_step(
    latents: Tensor, model_output: Tensor, sigmas: Tensor, step: int | Tensor, how: How, dtype: torch.dtype
) -> Tensor:
    """What the scripts sample where they want no noise: `x + dt v`."""
    sampler = Kind("ode").over("sigmas", sigmas)
    if how.rounding == "reference":
        moved = latents.detach() + sampler.rows(step, latents)("dt") * model_output.detach()
        return stored(moved, how.latents_dtype)
    return advance(latents, model_output, sampler, step, None, lambda: None, how, out_dtype=dtype).next_latents
