"""The two steps that DanceGRPO, MixGRPO and Pref-GRPO share, before each returns its own tuple."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transitions
from ..transitions import TransitionTable
from ._common import (
    Sampler,
    advance,
    as_step,
    cached,
    flow_denoised,
    flow_sampler,
    mean_and_denoised,
    noise_like,
    noise_like_sum,
    result_dtype,
    statistic,
    unnormalized,
)


class Found(NamedTuple):
    """What the three projects choose their tuples from, and where to read the statistics."""

    next_latents: Tensor
    denoised: Tensor
    log_prob: Tensor
    mean: Tensor | None
    table: TransitionTable
    step: int | Tensor

    def statistic(self, name: str) -> Tensor:
        """A column of the table at the step, float32 without dimensions."""
        return statistic(self.table, name, self.step, self.next_latents).float()


def _dance_sampler(sigmas: Tensor, eta: float, corrected: bool, normalized: bool) -> Sampler:
    table = transitions.dance_sde(sigmas, eta)
    if not corrected:
        one, zero = torch.ones_like(table.a), torch.zeros_like(table.a)
        table = replace(table, a=one, b=table.drift, denoised_weight=zero)
    return Sampler(table if normalized else unnormalized(table))


def dance_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    sde_solver: bool,
    *,
    normalized: bool,
    noisy_ode: bool,
    with_mean: bool,
    rounding: str,
    backend: str,
) -> Found:
    """Dance-SDE, or without `sde_solver` the Euler mean, to which `noisy_ode` still adds the noise."""
    key = ("dance", float(eta), sde_solver, normalized)
    sampler = cached("sigmas", sigmas, key, lambda s: _dance_sampler(s, eta, sde_solver, normalized))
    step = as_step(index, latents)
    settings: dict[str, Any] = {
        "out_dtype": result_dtype(latents, model_output),
        "rounding": rounding,
        "backend": backend,
    }
    if prev_sample is None and not sde_solver and not noisy_ode:
        euler = cached("sigmas", sigmas, ("ode",), lambda s: Sampler(transitions.ode(s)))
        prev_sample = advance(latents, model_output, euler, step, None, lambda: None, **settings).next_latents
    found = advance(
        latents,
        model_output,
        sampler,
        step,
        prev_sample,
        lambda: noise_like_sum(latents, model_output),
        with_mean=with_mean,
        **settings,
    )
    if rounding == "reference":
        denoised = mean_and_denoised(
            latents, model_output, sampler.table, step, result_dtype(latents, model_output), rounding
        )[1]
    else:
        denoised = flow_denoised(latents, model_output, -statistic(sampler.table, "q", step, latents), rounding)
    return Found(found.next_latents, denoised, found.log_prob, found.mean, sampler.table, step)


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
    key = ("dance", float(eta), sde_solver, True)
    sampler = cached("sigmas", sigmas, key, lambda s: _dance_sampler(s, eta, sde_solver, True))
    dtype = result_dtype(latents, model_output)
    return mean_and_denoised(latents, model_output, sampler.table, as_step(index, latents), dtype, rounding)


def flow_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Any,
    *,
    deterministic: bool,
    rounding: str,
    backend: str,
) -> Found:
    """Flow-SDE; `deterministic` draws the noise and then takes the Euler step, scored as a sample of the SDE."""
    sampler = cached("sigmas", sigmas, ("flow", float(eta), rounding), lambda s: flow_sampler(s, eta, rounding))
    euler = cached("sigmas", sigmas, ("ode",), lambda s: Sampler(transitions.ode(s)))
    step = as_step(index, latents)
    settings: dict[str, Any] = {
        "out_dtype": result_dtype(latents, model_output),
        "rounding": rounding,
        "backend": backend,
    }
    if deterministic:
        if prev_sample is None:
            noise_like(model_output, generator, model_output.dtype)  # the peer's generator moves on, too
        if rounding == "reference":
            dt = -statistic(euler.table, "step_size", step, latents).to(sigmas.dtype)
            prev_sample = (latents + dt * model_output).detach()
        else:
            prev_sample = advance(latents, model_output, euler, step, None, lambda: None, **settings).next_latents
    found = advance(
        latents,
        model_output,
        sampler,
        step,
        prev_sample,
        lambda: noise_like(model_output, generator, model_output.dtype),
        with_mean=True,
        **settings,
    )
    denoised = flow_denoised(latents, model_output, -statistic(euler.table, "q", step, latents), rounding)
    return Found(found.next_latents, denoised, found.log_prob, found.mean, sampler.table, step)
