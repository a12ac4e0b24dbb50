"""Flow-GRPO's step (yifan123/flow_grpo, `flow_grpo/diffusers_patch/sd3_sde_with_logprob.py`)."""

from typing import Any

import torch
from torch import Tensor

from ._common import advance, noise_like, statistic
from ._schedule import find_steps, flow_samplers


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
        sde_type: "sde" or "cps".
        return_sqrt_dt: also give `sqrt(-dt)`.
        rounding: "exact", or "reference" for the published order of float32 operations.
        backend: as for `transition_step`.

    Returns:
        `(prev_sample, log_prob, mean, std_dev_t[, sqrt_dt])`: float32; statistics in the shape of `timestep`
        followed by ones. `std_dev_t` is without `sqrt(-dt)`, for "cps" that of the noise. A CPS step without noise
        scores 0.

    Raises:
        ValueError: an unknown `sde_type`, a timestep that is not in the schedule, or bad input.
    """
    if sde_type not in ("sde", "cps"):
        raise ValueError(f'sde_type: got "{sde_type}", want "sde" or "cps"')
    sampler = flow_samplers(self.sigmas, "flow" if sde_type == "sde" else "cps", noise_level, rounding)
    step = find_steps(self, timestep).to(sample.device)
    found = advance(
        sample,
        model_output.float() if rounding == "reference" else model_output,
        sampler,
        step,
        None if prev_sample is None else prev_sample.float(),
        lambda: noise_like(model_output, generator, torch.float32),
        out_dtype=torch.float32,
        rounding=rounding,
        backend=backend,
        with_mean=True,
    )
    assert found.mean is not None
    sqrt_dt = torch.sqrt(statistic(sampler.table, "step_size", step, sample))
    tau = statistic(sampler.table, "tau", step, sample)
    std = tau / sqrt_dt if sde_type == "sde" else tau
    result = (found.next_latents, found.log_prob, found.mean, std.float())
    return (*result, sqrt_dt.float()) if return_sqrt_dt else result
