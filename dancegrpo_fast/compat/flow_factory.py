"""Flow-Factory's schedulers (X-GenGroup/Flow-Factory, `src/flow_factory/scheduler/`).

>>> import torch
>>> from dancegrpo_fast.compat.flow_factory import FlowMatchEulerDiscreteSDEScheduler
>>> scheduler = FlowMatchEulerDiscreteSDEScheduler(shift=3.0)
>>> scheduler.set_timesteps(10)
>>> latents, velocity, time = torch.randn(2, 16, 64), torch.randn(2, 16, 64), scheduler.timesteps[3]
>>> out = scheduler.step(velocity, time, latents)
>>> bool((scheduler.step(velocity, time, latents, next_latents=out.next_latents).log_prob == out.log_prob).all())
True
"""

import importlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, partialmethod
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from ..checks import check_choice
from ._factory import STATES, steps_of, values


@dataclass
class SDESchedulerOutput(BaseOutput):  # type: ignore[misc]  # diffusers has no types
    """What `step` returns, None where it was not asked for."""

    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None
    velocity: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Field by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SDESchedulerOutput":
        """The fields among `data`."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


def step(
    self: Any,
    velocity: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Any = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] | None = None,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
    state: str = "newest",
) -> Any:
    """One step of `FlowMatchEulerDiscreteSDEScheduler`, or the score of `next_latents`.

    Args:
        self: their scheduler or one like it, of which `timesteps`, `sigmas`, `noise_level`, `dynamics_type`, `is_eval`
            and `current_sde_steps` are read.
        velocity: `[B, ...]`; the log-probability and the mean are differentiable in it alone.
        timestep: one of the scheduler's, `[B]` or `[1]` of them, or an integer on the host: a step index.
        latents: `[B, ...]`.
        next_latents: what to score.
        timestep_next: the timestep after `timestep` in the schedule, 0 after the last; with it a sigma is its
            timestep / 1000.
        generator: what to draw float32 noise from, with diffusers' `randn_tensor`; ODE draws none.
        noise_level: eta, one number for the batch, as a tensor on the CPU; default the scheduler's inside its
            window and 0 outside.
        compute_log_prob: False gives None.
        return_dict: False gives `(next_latents, mean, velocity, log_prob, std_dev_t, dt)`.
        return_kwargs: which fields of the output to fill; default all.
        dynamics_type: instead of the scheduler's.
        sigma_max: what stands for a sigma of 1 under Flow-SDE's root; default the second sigma.
        rounding: "exact", or "reference" for the published order of float32 operations.
        backend: as for `transition_step`.
        latents_dtype: as for `dancegrpo.flux_step`; the coarser of it and the latents' own counts.
        state: of the project, one of `STATES`.

    Returns:
        Float32 tensors; `std_dev_t` and `dt` are `[B, 1, ...]`. A step without noise scores 0. The class is that of the
        project where `self` is of the project.

    Raises:
        ValueError: unknown dynamics, a timestep that is not in the schedule, several noise levels, or bad input.
    """
    found = values(**_given(locals()))
    return _output(self, found, return_kwargs) if return_dict else tuple(found.values())


def noise_pred_step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Any = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] | None = None,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
    state: str = "2026-03-21",
) -> Any:
    """`step` as it was called until 2026-05, `noise_pred` for `velocity`, in the output, too."""
    given = locals()
    return step(velocity=given.pop("noise_pred"), **given)


def unipc_step(
    self: Any,
    velocity: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Any = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] | None = None,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
    state: str = "newest",
) -> Any:
    """`step` of `UniPCMultistepSDEScheduler`, which the project's Wan models use.

    It differs in two things: in evaluation it is the multistep solver's own step and gives next latents alone, and
    `return_dict=False` gives `(next_latents, log_prob, mean, std_dev_t, dt)`.
    """
    given = locals()
    if self.is_eval:
        if timestep_next is None:
            index = steps_of(self, timestep, None, latents.device)[0]
            timestep = self.timesteps[[index] if isinstance(index, int) else index]
        moved = UniPCMultistepScheduler.step(self, velocity, timestep, latents, return_dict=False)[0]
        return _output(self, {"next_latents": moved}, ["next_latents"])
    found = values(**_given(given))
    if return_dict:
        return _output(self, found, return_kwargs)
    return tuple(found[name] for name in ("next_latents", "log_prob", "next_latents_mean", "std_dev_t", "dt"))


def unipc_noise_pred_step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Any = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] | None = None,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
    *,
    rounding: str = "exact",
    backend: str = "auto",
    latents_dtype: torch.dtype | None = None,
    state: str = "2026-03-21",
) -> Any:
    """`unipc_step` as it was called until 2026-05."""
    given = locals()
    return unipc_step(velocity=given.pop("noise_pred"), **given)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """A step's arguments as `values` takes them."""
    scheduler, whole = arguments.pop("self"), not arguments.pop("return_dict")
    dynamics = arguments.pop("dynamics_type") or scheduler.dynamics_type
    wanted = None if whole else arguments["return_kwargs"]
    del arguments["return_kwargs"]
    return {"scheduler": scheduler, "dynamics": dynamics, "wanted": wanted, **arguments}


def _output(scheduler: Any, found: dict[str, Tensor | None], names: Sequence[str] | None) -> Any:
    chosen = found if names is None else {name: found[name] for name in names if name in found}
    kind: Any = type(scheduler)
    return _output_class(kind).from_dict(chosen)


@cache
def _output_class(scheduler: Any) -> Any:
    """The project's own where the scheduler is the project's, so that its other parts know it."""
    for base in scheduler.__mro__:
        home = sys.modules.get(base.__module__) if base.__module__ != __name__ else None
        for name in (f"{base.__name__}Output", "SDESchedulerOutput"):
            if hasattr(getattr(home, name, None), "from_dict"):
                return getattr(home, name)
    return SDESchedulerOutput


class _Standalone(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    """diffusers' flow-matching scheduler with Flow-Factory's step, for where the project is not installed.

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

    step = step


_STEPS = {
    "FlowMatchEulerDiscreteSDEScheduler": (step, noise_pred_step),
    "UniPCMultistepSDEScheduler": (unipc_step, unipc_noise_pred_step),
}


def scheduler_class(name: str = "FlowMatchEulerDiscreteSDEScheduler") -> Any:
    """The project's scheduler of that name with `step` as the only difference, or one of our own without the project.

    It is also this module's attribute `name`, and the same class every time. The state of the project is told by the
    scheduler's signature and by what one of its steps on two numbers gives.

    Raises:
        ValueError: another name.
        ImportError: UniPC without `flow_factory`.
    """
    check_choice("name", name, tuple(_STEPS))
    return _made(name)


@cache
def _made(name: str) -> Any:
    try:
        theirs = getattr(importlib.import_module("flow_factory.scheduler"), name)
    except ImportError:
        if name == "UniPCMultistepSDEScheduler":
            raise
        return type(name, (_Standalone,), {"__module__": __name__, "__doc__": _Standalone.__doc__})
    state = state_of(theirs)
    step = partialmethod(_STEPS[name][state != "newest"], state=state)
    return type(name, (theirs,), {"__module__": __name__, "__doc__": theirs.__doc__, "step": step})


def state_of(scheduler: Any) -> str:
    """Which of `STATES` a scheduler class of the project is in."""
    if "velocity" in inspect.signature(scheduler.step).parameters:
        return "newest"
    one = scheduler()
    one.sigmas = torch.tensor([0.75, 0.5, 0.25, 0.0])
    one.timesteps = one.sigmas[:-1] * 1000
    found = one.step(
        torch.tensor([[[0.1, 0.7]]]),
        500.0,
        torch.tensor([[[0.3, -0.9]]], dtype=torch.bfloat16),
        generator=torch.Generator().manual_seed(0),
        noise_level=0.5,
        dynamics_type="Dance-SDE",
    )
    kept = torch.equal(found.next_latents, found.next_latents.bfloat16().float())
    bare = bool((found.std_dev_t == 0.5).all())
    return next(word for word, state in STATES.items() if state[:3] == (kept, bare, False))


def __getattr__(name: str) -> Any:
    if name in _STEPS:
        return scheduler_class(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
