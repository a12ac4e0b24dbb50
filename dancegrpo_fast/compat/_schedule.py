"""Timesteps of a diffusers flow-matching scheduler as rows of a table, and the samplers its peers name."""

from typing import Any

import torch
from torch import Tensor

from .. import transitions
from ._common import Sampler, cached, flow_sampler, unnormalized


def find_steps(scheduler: Any, timestep: Any) -> Tensor:
    """The index of every timestep in the scheduler's, int64 `[K]`, found without a sync.

    Raises:
        ValueError: a timestep that is not in the schedule (CUDA tensors fail a device-side assertion instead).
    """
    if not isinstance(timestep, Tensor):
        timestep = torch.as_tensor(timestep, dtype=scheduler.timesteps.dtype)
    wanted, times = timestep.reshape(-1), scheduler.timesteps
    device = times.device if wanted.device.type == "cpu" else wanted.device  # never back to the host
    matches: Tensor = wanted.to(device)[:, None] == times.to(device)
    require(
        matches.any(dim=1).all(),
        lambda: f"timestep: got {wanted.tolist()}, want some of the scheduler's, {times.tolist()}",
    )
    return matches.to(torch.int64).argmax(dim=1)


def require(condition: Tensor, message: Any) -> None:
    """ValueError of `message()` unless the 0-dim tensor is true, which a CUDA tensor is asked on its device."""
    if condition.device.type != "cpu":
        torch._assert_async(condition)
    elif not bool(condition):
        raise ValueError(message())


def flow_samplers(
    sigmas: Tensor,
    kind: str,
    level: float,
    rounding: str,
    *,
    normalized: bool = True,
    window: tuple[int, ...] | None = None,
    sigma_max: float | None = None,
) -> Sampler:
    """ "flow", "dance", "cps" or "ode" over `sigmas`; outside `window` the level is 0."""

    def build(values: Tensor, level: float) -> Sampler:
        if kind == "flow":
            return flow_sampler(values, level, rounding, sigma_max)
        if kind == "ode":
            return Sampler(transitions.ode(values))
        return Sampler((transitions.dance_sde if kind == "dance" else transitions.cps)(values, level))

    def build_all(values: Tensor) -> Sampler:
        table, factor = build(values, level)
        if window is not None:
            calm = build(values, 0.0)
            table = transitions.mixed(table, calm.table, window)
            if factor is not None and calm.factor is not None:
                inside = torch.zeros(len(table), dtype=torch.bool)
                inside[list(window)] = True
                factor = torch.where(inside, factor, calm.factor)
        return Sampler(table if normalized else unnormalized(table), factor)

    key = (kind, float(level), rounding, normalized, window, sigma_max)
    return cached("sigmas", sigmas, key, build_all)
