"""Predicts, chooses and measures memory: real diffusers models on fake tensors.

from dancegrpo_fast import memory

found = memory.plan(memory.Settings("hunyuan-video", frames=53, height=480, width=640, lora=32))
print(found.table())

Public names load on first use; importing this loads neither torch nor diffusers by itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..attention.choice import choose as choose
    from ..profile.profiler import profile as profile
    from ..profile.profiler import profile_recipe as profile_recipe
    from .planning.planner import Plan as Plan
    from .planning.planner import plan as plan
    from .planning.settings import Rates as Rates
    from .planning.settings import Reward as Reward
    from .planning.settings import Settings as Settings

_HOMES = {
    "Plan": "planning.planner",
    "Rates": "planning.settings",
    "Reward": "planning.settings",
    "Settings": "planning.settings",
    "choose": ".attention",
    "plan": "planning.planner",
    "profile": ".profile",
    "profile_recipe": ".profile",
}
_MODULES = {
    "attention": ".attention",
    "checkpointing": ".activations.checkpointing",
    "solve": "planning.solve",
    "specs": "planning.specs",
    "trace": "trace",
}

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{_MODULES[name]}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
