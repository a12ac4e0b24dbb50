"""verl-omni's scheduler (verl-project/verl-omni, `verl_omni/pipelines/schedulers/flow_match_sde.py`).

>>> import torch
>>> from dancegrpo_fast.compat.verl_omni import FlowMatchSDEDiscreteScheduler
>>> scheduler = FlowMatchSDEDiscreteScheduler(shift=3.0)
>>> scheduler.set_timesteps(10)
>>> sample, output, times = torch.randn(2, 16, 64), torch.randn(2, 16, 64), scheduler.timesteps[3:4]
>>> after, log_prob, mean, std = scheduler.sample_previous_step(sample, output, times)
>>> bool((scheduler.sample_previous_step(sample, output, times, prev_sample=after)[1] == log_prob).all())
True
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from ..checks import check_choice
from ._common import How, advance, noise_like
from ._samplers import Kind
from ._schedule import find_steps

_KINDS = {"sde": "flow", "cps": "cps", "dance_sde": "dance"}


@dataclass
class FlowMatchSDEDiscreteSchedulerOutput(BaseOutput):  # type: ignore[misc]  # diffusers has no types
    """What `step` returns: next latents, log-probability `[B]`, mean, and standard deviation."""

    prev_sample: Tensor
    log_prob: Tensor | None
    prev_sample_mean: Tensor
    std_dev_t: Tensor


class FlowMatchSDEDiscreteScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    """diffusers' flow-matching scheduler with verl-omni's stochastic steps."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        noise_level: float = 0.7,
        prev_sample: Tensor | None = None,
        sde_type: str = "sde",
        return_logprobs: bool = True,
        include_logprob_normalizer: bool = True,
    ) -> FlowMatchSDEDiscreteSchedulerOutput | tuple[Tensor | None, ...]:
        """The next step of a denoising loop: `sample_previous_step` at the scheduler's own index, which moves on.

        `timestep` finds the first index; `s_churn` to `s_noise` change nothing. Latents are taken as float32.

        Raises:
            ValueError: an integer timestep, or bad input.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep: got the integer {timestep}, want one of the scheduler's timesteps")
        if self.step_index is None:
            self._init_step_index(timestep)
        result = self.sample_previous_step(
            sample=sample.float(),
            model_output=model_output,
            generator=generator,
            per_token_timesteps=per_token_timesteps,
            noise_level=noise_level,
            prev_sample=None if prev_sample is None else prev_sample.float(),
            sde_type=sde_type,
            return_logprobs=return_logprobs,
            include_logprob_normalizer=include_logprob_normalizer,
        )
        self._step_index += 1
        return FlowMatchSDEDiscreteSchedulerOutput(*result) if return_dict else result

    def sample_previous_step(
        self,
        sample: Tensor,
        model_output: Tensor,
        timestep: Tensor | None = None,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        noise_level: float = 0.7,
        prev_sample: Tensor | None = None,
        sde_type: str = "sde",
        return_logprobs: bool = True,
        return_sqrt_dt: bool = False,
        include_logprob_normalizer: bool = True,
        *,
        rounding: str = "exact",
        backend: str = "auto",
        latents_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, ...]:
        """One Flow-SDE, CPS or Dance-SDE step, or the score of `prev_sample`.

        Args:
            sample: float32 `[B, ...]`.
            model_output: float32 `[B, ...]`; the log-probability and the mean are differentiable in it alone.
            timestep: `[B]` or `[1]`, some of the scheduler's; None takes the scheduler's own index.
            generator: what to draw the noise from, with diffusers' `randn_tensor`.
            per_token_timesteps: not supported, as in verl-omni.
            noise_level: eta.
            prev_sample: float32 next latents to score.
            sde_type: "sde", "cps" or "dance_sde".
            return_logprobs: False gives None for the log-probability.
            return_sqrt_dt: also give `sqrt(-dt)`, `[B]` or `[1]`.
            include_logprob_normalizer: False leaves out the Gaussian's constants.
            rounding: "exact", or "reference" for the published order of float32 operations.
            backend: as for `transition_step`.
            latents_dtype: as for `dancegrpo.flux_step`.

        Returns:
            `(prev_sample, log_prob, mean, std_dev_t[, sqrt_dt])`. `std_dev_t` is without `sqrt(-dt)` for "sde" and
            with it for "dance_sde"; without dimensions, or in the shape of `timestep` followed by ones.

        Raises:
            ValueError: an unknown `sde_type`, `per_token_timesteps`, another dtype, or a timestep not in the schedule.
        """
        check_choice("sde_type", sde_type, tuple(_KINDS))
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps: got a value, want None: a table has one row for each sample")
        for name, value in (("sample", sample), ("model_output", model_output), ("prev_sample", prev_sample)):
            if value is not None and value.dtype != torch.float32:
                raise ValueError(f"{name}: got {value.dtype}, want torch.float32")
        if timestep is None and self.step_index is None:
            raise ValueError("timestep: got None before the first step, want the scheduler's timesteps")
        kind = Kind(_KINDS[sde_type], noise_level, normalized=include_logprob_normalizer)
        sampler = kind.over("self.sigmas", self.sigmas)
        step, count = (self.step_index, 0) if timestep is None else find_steps(self, timestep, sample.device)
        found = advance(
            sample,
            model_output,
            sampler,
            step,
            prev_sample,
            lambda: noise_like(model_output, generator, model_output.dtype),
            How(rounding, backend, latents_dtype),
            out_dtype=torch.float32,
            mean=True,
        )
        shape = (count, *(1,) * (sample.ndim - 1)) if count else ()
        std = sampler.statistic("std" if sde_type == "sde" else "tau", step, shape, sample.device, rounding)
        result = (found.next_latents, found.log_prob if return_logprobs else None, found.mean, std)
        if not return_sqrt_dt:
            return result
        return *result, sampler.statistic("root", step, (count or len(sample),), sample.device, rounding)
