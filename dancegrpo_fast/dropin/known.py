"""The step functions of known projects: names, signatures, and what of ours stands in for each. Needs no torch."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PEERS = "dancegrpo_fast.compat"
# Of ours alone: how it computes, not what.
SETTINGS = ("rounding", "backend", "latents_dtype")
Parameters = Mapping[str, inspect.Parameter]


@dataclass(frozen=True)
class Known:
    """One generation of one project's function.

    `ours` is "module:qualified name" in this package, `options` the keyword arguments that make it this generation.
    """

    name: str
    owner: str | None
    ours: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The dotted name of ours."""
        return f"{PEERS}.{self.ours.replace(':', '.')}"

    def load(self) -> Callable[..., Any]:
        """Ours, imported now."""
        module, _, names = self.ours.partition(":")
        found: Any = importlib.import_module(f"{PEERS}.{module}")
        for name in names.split("."):
            found = getattr(found, name)
        return found  # type: ignore[no-any-return]  # looked up by name


_EULER, _UNIPC = "FlowMatchEulerDiscreteSDEScheduler", "UniPCMultistepSDEScheduler"
_VERL = "FlowMatchSDEDiscreteScheduler"
_SOLVER = {"grpo": True, "sde_solver": True}
_OLDER = ("2026-03-21", "2026-03-14", "2026-01")
# Of one name the first that computes what the original does is taken.
KNOWN = (
    Known("flux_step", None, "dancegrpo:flux_step", "DanceGRPO"),
    Known("flux_step", None, "dancegrpo:flux_step", "DanceGRPO until 2025-08", {"normalized": False}),
    Known("flux_step", None, "dancegrpo:flux_step_with_ddpo", "DanceGRPO, a fork"),
    Known("flux_step", None, "dancegrpo:flux_step_with_ddpo", "DanceGRPO, a fork", {"normalized": False}),
    Known("flux_step_with_split", None, "dancegrpo:flux_step", "TreeGRPO without splits"),
    Known("ddim_step_with_logprob", None, "ddpo:ddim_step_with_logprob", "DDPO"),
    Known("sde_step_with_logprob", None, "flow_grpo:sde_step_with_logprob", "Flow-GRPO"),
    Known("sde_step_with_logprob", None, "flow_grpo:sde_step_with_logprob", "FlowCPS", {"sde_type": "cps"}),
    Known("sde_step_with_logprob", None, "flow_grpo:wan_sde_step_with_logprob", "Flow-GRPO for Wan"),
    Known("sde_step_with_logprob", None, "flow_grpo:wan_sde_step_with_logprob", "Flow-GRPO of 2025-05", {"level": 0.7}),
    Known("ode_step_with_logprob", None, "flow_grpo:ode_step_with_logprob", "Flow-GRPO"),
    Known("flow_grpo_step", None, "mixgrpo:flow_grpo_step", "MixGRPO"),
    Known("flow_grpo_step", None, "pref_grpo:flow_grpo_step", "Pref-GRPO, DiffusionNFT"),
    Known("dance_grpo_step", None, "mixgrpo:dance_grpo_step", "MixGRPO"),
    Known("dance_grpo_step", None, "pref_grpo:dance_grpo_step", "Pref-GRPO"),
    Known("dance_grpo_step", None, "mixgrpo:dance_grpo_step", "DiffusionNFT", _SOLVER),
    Known("sample_previous_step", _VERL, f"verl_omni:{_VERL}.sample_previous_step", "verl-omni"),
    Known("step", _EULER, "flow_factory:step", "Flow-Factory"),
    *(Known("step", _EULER, "flow_factory:noise_pred_step", f"Flow-Factory, {s}", {"state": s}) for s in _OLDER),
    Known("step", _UNIPC, "flow_factory:unipc_step", "Flow-Factory"),
    *(Known("step", _UNIPC, "flow_factory:unipc_noise_pred_step", f"Flow-Factory, {s}", {"state": s}) for s in _OLDER),
)


def candidates(name: str, owner: str | None) -> tuple[Known, ...]:
    """All generations of a name, in the order in which they are tried."""
    return tuple(known for known in KNOWN if (known.name, known.owner) == (name, owner))


def misfit(
    known: Known, theirs: Iterable[inspect.Parameter], ours: Iterable[inspect.Parameter] | None = None
) -> str | None:
    """Why a function with these parameters cannot be called as ours is; None where it can.

    Defaults may differ, as every argument is handed on, and parameters that ours lacks may be there if they have one.
    Without `ours` it is imported, and torch with it.
    """
    given = {p.name: p for p in theirs}
    mine = inspect.signature(known.load()).parameters.values() if ours is None else ours
    wanted = {p.name: p for p in mine if p.name not in SETTINGS}
    empty = inspect.Parameter.empty
    for name, p in wanted.items():
        if name not in given and p.default is empty and name not in known.options:
            return f"has no parameter {name}"
    for name, p in given.items():
        if name in known.options:
            return f"has a parameter {name}"
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            return f"takes {p}"
        if name not in wanted and p.default is empty:
            return f"has a parameter {name} without a default"
    return None
