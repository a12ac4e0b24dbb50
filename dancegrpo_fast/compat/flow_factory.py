"""Flow-Factory's scheduler (X-GenGroup/Flow-Factory, `src/flow_factory/scheduler/flow_match_euler_discrete.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from ._common import advance, noise_like, statistic
from ._schedule import find_steps, flow_samplers, require

_KINDS = {"Flow-SDE": "flow", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}


@dataclass
class SDESchedulerOutput(BaseOutput):  # type: ignore[misc]  # diffusers has no types
    """What `step` returns, None where it was not asked for."""

    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Field by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SDESchedulerOutput":
        """The fields among `data`."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


class FlowMatchEulerDiscreteSDEScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    """diffusers' flow-matching scheduler with Flow-Factory's stochastic step.

    Args:
        noise_level: eta inside the window.
        sde_steps: step indices from which the window is drawn; default all but the last.
        num_sde_steps: how many of them are stochastic; default all.
        seed: which of them.
        dynamics_type: "Flow-SDE", "Dance-SDE", "CPS" or "ODE".
        kwargs: the diffusers scheduler's.
    """

    def __init__(
        self,
        noise_level: float = 0.7,
        sde_steps: Sequence[int] | None = None,
        num_sde_steps: int | None = None,
        seed: int = 42,
        dynamics_type: str = "Flow-SDE",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.noise_level = noise_level
        self.sde_steps = sde_steps
        self.num_sde_steps = num_sde_steps
        self.seed = seed
        self.dynamics_type = dynamics_type
        self.is_eval = False

    def train(self, mode: bool = True) -> None:
        """Stochastic steps, or with False what `eval` does."""
        self.is_eval = not mode

    def eval(self) -> None:
        """Steps at noise level 0."""
        self.train(False)

    @property
    def current_sde_steps(self) -> Tensor:
        """The window: int64 indices of the steps with noise."""
        steps = range(len(self.timesteps) - 1) if self.sde_steps is None else self.sde_steps
        eligible = torch.as_tensor(list(steps), dtype=torch.int64)
        if self.num_sde_steps is None or self.num_sde_steps >= len(eligible):
            return eligible
        chosen = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(self.seed))
        return eligible[chosen[: self.num_sde_steps]]

    def step(
        self,
        noise_pred: Tensor,
        timestep: float | Tensor,
        latents: Tensor,
        next_latents: Tensor | None = None,
        timestep_next: float | Tensor | None = None,
        generator: Any = None,
        noise_level: float | Tensor | None = None,
        compute_log_prob: bool = True,
        return_dict: bool = True,
        return_kwargs: Sequence[str] = [  # as published; it is only read
            "next_latents",
            "next_latents_mean",
            "std_dev_t",
            "dt",
            "log_prob",
            "noise_pred",
        ],
        dynamics_type: str | None = None,
        sigma_max: float | None = None,
        *,
        rounding: str = "exact",
        backend: str = "auto",
    ) -> SDESchedulerOutput | tuple[Tensor | None, ...]:
        """One step, or the score of `next_latents`.

        Args:
            noise_pred: `[B, ...]`, the velocity; the log-probability and the mean are differentiable in it alone.
            timestep: one of the scheduler's, `[B]` or `[1]` of them, or integers: step indices.
            latents: `[B, ...]`.
            next_latents: what to score.
            timestep_next: the timestep after `timestep` in the schedule, 0 after the last.
            generator: what to draw float32 noise from, with diffusers' `randn_tensor`; ODE draws none.
            noise_level: eta, one number for the batch, as a tensor on the CPU; default the scheduler's inside its
                window and 0 outside.
            compute_log_prob: False gives None.
            return_dict: False gives `(next_latents, mean, noise_pred, log_prob, std_dev_t, dt)`.
            return_kwargs: which fields of the output to fill.
            dynamics_type: instead of the scheduler's.
            sigma_max: what stands for a sigma of 1 under Flow-SDE's root; default the second sigma.
            rounding: "exact", or "reference" for the published order of float32 operations.
            backend: as for `transition_step`.

        Returns:
            Float32 tensors; `std_dev_t` and `dt` are `[B, 1, ...]`. `std_dev_t` is without `sqrt(-dt)` for Flow-SDE
            alone. A step without noise scores 0.

        Raises:
            ValueError: unknown dynamics, a timestep that is not in the schedule, several noise levels, or bad input.
        """
        dynamics = dynamics_type or self.dynamics_type
        if dynamics not in _KINDS:
            raise ValueError(f'dynamics_type: got "{dynamics}", want one of {list(_KINDS)}')
        level, window = _level(self, noise_level, dynamics)
        sampler = flow_samplers(
            self.sigmas, _KINDS[dynamics], level, rounding, window=window, sigma_max=sigma_max or None
        )
        step = _steps(self, timestep, timestep_next).to(latents.device).expand(len(latents))
        found = advance(
            latents,
            noise_pred.float() if rounding == "reference" else noise_pred,
            sampler,
            step,
            None if next_latents is None else next_latents.float(),
            lambda: None if dynamics == "ODE" else noise_like(noise_pred, generator, torch.float32),
            out_dtype=torch.float32,
            rounding=rounding,
            backend=backend,
            with_mean=not return_dict or "next_latents_mean" in return_kwargs,
        )
        step_size = statistic(sampler.table, "step_size", step, latents)
        tau = statistic(sampler.table, "tau", step, latents)
        std = tau / torch.sqrt(step_size) if dynamics == "Flow-SDE" else tau
        values = {
            "next_latents": found.next_latents,
            "next_latents_mean": found.mean,
            "noise_pred": noise_pred.float(),
            "log_prob": found.log_prob if compute_log_prob else None,
            "std_dev_t": std.float(),
            "dt": -step_size.float(),
        }
        if not return_dict:
            return tuple(values.values())
        return SDESchedulerOutput.from_dict({name: values[name] for name in return_kwargs if name in values})


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


def _steps(scheduler: Any, timestep: float | Tensor, timestep_next: float | Tensor | None) -> Tensor:
    """Step indices `[K]`; `timestep_next` is only compared with the schedule."""
    integers = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
    if integers and timestep_next is None:
        return torch.as_tensor(timestep, dtype=torch.int64).reshape(-1)
    step = find_steps(scheduler, timestep)
    if timestep_next is not None:
        given = torch.as_tensor(timestep_next).to(step.device).reshape(-1)
        times = scheduler.timesteps.to(step.device)
        after = torch.cat([times[1:], times.new_zeros(1)])[step]
        require(
            (given == after).all(),
            lambda: f"timestep_next: got {given.tolist()}, want what follows in the schedule, {after.tolist()}",
        )
    return step
