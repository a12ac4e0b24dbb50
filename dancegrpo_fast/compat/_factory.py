"""What Flow-Factory's two schedulers share: the states of the project, and everything that a step may return."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice
from ._common import How, advance, cached, coarser, noise_like
from ._samplers import Kind
from ._schedule import find_steps, require

_KINDS = {"Flow-SDE": "flow", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}


class State(NamedTuple):
    """What of the project changed.

    Attributes:
        rounded: next latents that are drawn are rounded to the latents' dtype before they are scored.
        bare: Dance-SDE's `std_dev_t` lacks `sqrt(-dt)`, as Flow-SDE's.
        velocity: the field of the output is `velocity`, not `noise_pred`.
        elementwise: with `rounding="reference"`, the log-probability is the float64 mean of float32 elements.
    """

    rounded: bool
    bare: bool
    velocity: bool = False
    elementwise: bool = False


STATES = {
    "newest": State(True, True, True, True),
    "2026-03-21": State(True, True),
    "2026-03-14": State(True, False),
    "2026-01": State(False, False),
}


def values(
    scheduler: Any,
    velocity: Tensor,
    timestep: Any,
    latents: Tensor,
    next_latents: Tensor | None,
    timestep_next: Any,
    generator: Any,
    noise_level: float | Tensor | None,
    compute_log_prob: bool,
    dynamics: str,
    sigma_max: float | None,
    wanted: Sequence[str] | None,
    rounding: str,
    backend: str,
    latents_dtype: torch.dtype | None,
    state: str,
) -> dict[str, Tensor | None]:
    """Everything that a step may return."""
    check_choice("dynamics_type", dynamics, tuple(_KINDS))
    check_choice("state", state, tuple(STATES))
    made, sigma_max = STATES[state], sigma_max or None
    name, wide = "velocity" if made.velocity else "noise_pred", velocity.float()
    if not compute_log_prob and wanted is not None and set(wanted) <= {name}:
        # Trainers without a ratio ask for nothing else, at times that no schedule has; the generator moves on.
        if next_latents is None and dynamics != "ODE":
            noise_like(velocity, generator, torch.float32)
        return {name: wide}
    level, window = _level(scheduler, noise_level, dynamics)
    kind = Kind(_KINDS[dynamics], level, window=window, sigma_max=sigma_max, writing="factory")
    sigmas = scheduler.sigmas
    if timestep_next is not None:
        sigmas = cached("self.timesteps", scheduler.timesteps, "sigmas", _sigmas_of)
        if dynamics == "Flow-SDE" and sigma_max is None:
            kind = Kind("flow", level, window=window, sigma_max=_second(scheduler.sigmas), writing="factory")
    sampler = kind.over("self.sigmas", sigmas)
    step = steps_of(scheduler, timestep, timestep_next, latents.device)[0]
    if made.rounded and dynamics != "ODE":
        latents_dtype = coarser(latents.dtype, latents_dtype)
    found = advance(
        latents.float() if rounding == "reference" else latents,
        wide if rounding == "reference" else velocity,
        sampler,
        step,
        None if next_latents is None else next_latents.float(),
        lambda: None if dynamics == "ODE" else noise_like(velocity, generator, torch.float32),
        How(rounding, backend, latents_dtype),
        out_dtype=torch.float32,
        mean=wanted is None or "next_latents_mean" in wanted,
        elementwise=made.elementwise,
    )
    shape = (len(latents), *(1,) * (latents.ndim - 1))
    std = "std" if dynamics == "Flow-SDE" or (dynamics == "Dance-SDE" and made.bare) else "tau"
    return {
        "next_latents": found.next_latents,
        "next_latents_mean": found.mean,
        name: wide,
        "log_prob": found.log_prob if compute_log_prob else None,
        "std_dev_t": sampler.statistic(std, step, shape, latents.device, rounding),
        "dt": sampler.statistic("dt", step, shape, latents.device, rounding),
    }


def _sigmas_of(timesteps: Tensor) -> Tensor:
    return torch.cat([timesteps, timesteps.new_zeros(1)]) / 1000


def _following(timesteps: Tensor) -> Tensor:
    return torch.cat([timesteps[1:], timesteps.new_zeros(1)])


def _second(sigmas: Tensor) -> float:
    return cached("self.sigmas", sigmas, "second", lambda values: float(values[1]))


def _level(scheduler: Any, noise_level: float | Tensor | None, dynamics: str) -> tuple[float, tuple[int, ...] | None]:
    """The noise level, and the window to which it is confined."""
    if scheduler.is_eval or dynamics == "ODE":
        return 0.0, None
    if noise_level is None:
        return scheduler.noise_level, tuple(scheduler.current_sde_steps.tolist())
    if not isinstance(noise_level, Tensor):
        return noise_level, None
    if noise_level.device.type != "cpu":
        raise ValueError(f"noise_level: got a tensor on {noise_level.device}, want a number or a tensor on the CPU")
    levels = set(noise_level.flatten().tolist())
    if len(levels) != 1:
        raise ValueError(f"noise_level: got {sorted(levels)}, want one level for the batch")
    return levels.pop(), None


def steps_of(scheduler: Any, timestep: Any, timestep_next: Any, device: torch.device) -> tuple[int | Tensor, int]:
    """Step indices and their number; `timestep_next` is only compared with the schedule."""
    if timestep_next is None:
        if isinstance(timestep, int):
            return timestep, 1
        if isinstance(timestep, Tensor) and timestep.device.type == "cpu" and not timestep.is_floating_point():
            # What the project takes for an index, too, though UniPC's own timesteps are integers.
            indices = timestep.reshape(-1)
            return (int(indices[0]) if len(indices) == 1 else indices.to(device)), len(indices)
        return find_steps(scheduler, timestep, device)
    found, count = find_steps(scheduler, timestep, device)
    given = timestep_next
    if not isinstance(given, Tensor):
        given = torch.as_tensor(given, dtype=scheduler.timesteps.dtype, device="cpu")
    given = given.reshape(-1)
    following = cached("self.timesteps", scheduler.timesteps, "following", _following)
    if given.device.type == "cpu" and not isinstance(found, Tensor):
        after = following.tolist()[found]
        if any(value != after for value in given.tolist()):
            raise ValueError(f"timestep_next: got {given.tolist()}, want what follows in the schedule, {after}")
        return found, count
    at = found.to(given.device) if isinstance(found, Tensor) else found
    right = (given == following.to(given.device)[at]).all()
    require(right, lambda: f"timestep_next: got {given.tolist()}, want what follows each timestep in the schedule")
    return found, count
