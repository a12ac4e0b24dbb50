"""Flow-GRPO's steps (yifan123/flow_grpo, `flow_grpo/diffusers_patch/`: SD3, FLUX and Wan), and FlowCPS's.

>>> import torch
>>> from diffusers import FlowMatchEulerDiscreteScheduler
>>> from dancegrpo_fast.compat.flow_grpo import sde_step_with_logprob
>>> scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
>>> scheduler.set_timesteps(10)
>>> sample, output, times = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), scheduler.timesteps[3:4]
>>> after, log_prob, mean, std = sde_step_with_logprob(scheduler, output, times, sample, 0.7)
>>> bool((sde_step_with_logprob(scheduler, output, times, sample, 0.7, after)[1] == log_prob).all())
True
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice
from ._common import How, Outcome, Sampler, advance, noise_like
from ._grpo import euler_step
from ._samplers import Kind
from ._schedule import find_steps


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    sde_type: str | None = "sde",
    return_sqrt_dt: bool | None = False,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """One Flow-SDE or CPS step, or the score of `prev_sample`.

    Args:
        self: a diffusers flow-matching scheduler, of which `sigmas` and `timesteps` are read.
        model_output: `[B, ...]`, the velocity; the log-probability and the mean are differentiable in it alone.
        timestep: `[B]`, or `[1]` for all samples: some of `self.timesteps`.
        sample: `[B, ...]`.
        noise_level: eta.
        prev_sample: next latents to score.
        generator: what to draw float32 noise from, with diffusers' `randn_tensor`.
        sde_type: "sde" or "cps"; FlowCPS has "cps" under the same name without this argument.
        return_sqrt_dt: also give `sqrt(-dt)`.
        rounding: "exact", or "reference" for the published order of float32 operations.
        backend: as for `transition_step`.
        latents_dtype: as for `dancegrpo.flux_step`.

    Returns:
        `(prev_sample, log_prob, mean, std_dev_t[, sqrt_dt])`: float32; statistics in the shape of `timestep`
        followed by ones. `std_dev_t` is without `sqrt(-dt)`, for "cps" that of the noise. A CPS step without noise
        scores 0.

    Raises:
        ValueError: an unknown `sde_type`, a timestep that is not in the schedule, or bad input.
    """
    check_choice("sde_type", sde_type, ("sde", "cps"))
    sampler = Kind("flow" if sde_type == "sde" else "cps", noise_level).over("self.sigmas", self.sigmas)
    step, count = find_steps(self, timestep, sample.device)
    how = How(rounding, backend, latents_dtype)
    found = _advance(sampler, model_output, step, sample, prev_sample, generator, torch.float32, how)
    std = "std" if sde_type == "sde" else "tau"
    names = (std, "root") if return_sqrt_dt else (std,)
    return _tuple(found, sampler, names, step, count, rounding)


def wan_sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    determistic: bool = False,
    return_pixel_log_prob: bool = False,
    return_dt_and_std_dev_t: bool = False,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
    level: float | None = None,
) -> tuple[Tensor, ...]:
    """One step of Flow-GRPO's Wan scripts, or the score of `prev_sample`; with `level` that of its first SD3 scripts.

    Args:
        self, model_output, timestep, sample, rounding, backend, latents_dtype: as for `sde_step_with_logprob`; `self`
            may be a `UniPCMultistepScheduler`.
        prev_sample: next latents to score.
        generator: what to draw the noise from, with diffusers' `randn_tensor`.
        determistic: take the Euler step, whatever `prev_sample` is, and score it as a sample of the SDE; without
            `prev_sample` the noise is drawn all the same.
        return_pixel_log_prob: changes nothing, as published.
        return_dt_and_std_dev_t: give `std_dev_t` and `sqrt(-dt)` for their product.
        level: Flow-SDE at this noise level, with noise drawn in the dtype of `model_output`, as in 2025-05; None is
            Wan's level, which goes linearly from the second sigma to the last, with float32 noise.

    Returns:
        `(prev_sample, log_prob, mean, std_dev_t sqrt(-dt))`, or `(prev_sample, log_prob, mean, std_dev_t, sqrt(-dt))`:
        float32; statistics in the shape of `timestep` followed by ones.

    Raises:
        ValueError: both `prev_sample` and `generator`, a timestep that is not in the schedule, or bad input.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: got one together with prev_sample, want one of them")
    kind = Kind("wan") if level is None else Kind("flow", level)
    sampler = kind.over("self.sigmas", self.sigmas)
    step, count = find_steps(self, timestep, sample.device)
    how = How(rounding, backend, latents_dtype)
    noise_dtype = torch.float32 if level is None else model_output.dtype
    if determistic:
        if prev_sample is None:
            noise_like(model_output, generator, noise_dtype)  # the peer's generator moves on, too
        prev_sample = euler_step(sample.float(), model_output.float(), self.sigmas, step, how, torch.float32)
    found = _advance(sampler, model_output, step, sample, prev_sample, generator, noise_dtype, how)
    names = ("std", "root") if return_dt_and_std_dev_t else ("tau",)
    return _tuple(found, sampler, names, step, count, rounding)


def ode_step_with_logprob(
    self: Any,
    model_output: Tensor,
    mean_model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    sde_type: str | None = "sde",
    return_sqrt_dt: bool | None = False,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The Euler step by `model_output`, or `prev_sample`, scored by its distance from the one by `mean_model_output`.

    Args:
        mean_model_output: `[B, ...]`, the velocity of the mean; the log-probability and the mean are differentiable in
            it alone.
        generator, sde_type: change nothing: nothing is drawn.
        others: as for `sde_step_with_logprob`.

    Returns:
        `(prev_sample, log_prob, mean, std_dev_t[, sqrt_dt])` with `log_prob = -mean((prev_sample - mean)^2)`.
        `std_dev_t` is Flow-SDE's without `sqrt(-dt)`.

    Raises:
        ValueError: a timestep that is not in the schedule, or bad input.
    """
    step, count = find_steps(self, timestep, sample.device)
    how = How(rounding, backend, latents_dtype)
    if prev_sample is None:
        prev_sample = euler_step(sample.float(), model_output.float(), self.sigmas, step, how, torch.float32)
    distance = Kind("distance").over("self.sigmas", self.sigmas)
    found = _advance(distance, mean_model_output, step, sample, prev_sample, None, torch.float32, how)
    sampler = Kind("flow", noise_level).over("self.sigmas", self.sigmas)
    names = ("std", "root") if return_sqrt_dt else ("std",)
    return _tuple(found, sampler, names, step, count, rounding)


def _advance(
    sampler: Sampler,
    model_output: Tensor,
    step: int | Tensor,
    sample: Tensor,
    prev_sample: Tensor | None,
    generator: Any,
    noise_dtype: torch.dtype,
    how: How,
) -> Outcome:
    """`advance` with the project's float32: of outputs and latents, and of what is scored."""
    if how.rounding == "reference":
        model_output, sample = model_output.float(), sample.float()
    return advance(
        sample,
        model_output,
        sampler,
        step,
        None if prev_sample is None else prev_sample.float(),
        lambda: noise_like(model_output, generator, noise_dtype).float(),
        how,
        out_dtype=torch.float32,
        mean=True,
    )


def _tuple(
    found: Outcome, sampler: Sampler, names: tuple[str, ...], step: int | Tensor, count: int, rounding: str
) -> tuple[Tensor, ...]:
    assert found.mean is not None
    shape = (count, *(1,) * (found.mean.ndim - 1))
    device = found.mean.device
    statistics = [sampler.statistic(name, step, shape, device, rounding) for name in names]
    return found.next_latents, found.log_prob, found.mean, *statistics
