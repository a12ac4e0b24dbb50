"""Predicts, chooses and measures memory: real diffusers models on fake tensors.

from dancegrpo_fast import memory

found = memory.plan(memory.Settings("hunyuan-video", frames=53, height=480, width=640, lora=32))
print(found.table())

Public names load on first use; importing this loads neither torch nor diffusers by itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import choose as choose
    from .planner import Plan as Plan
    from .planner import plan as plan
    from .profiler import profile as profile
    from .profiler import profile_recipe as profile_recipe
    from .settings import Rates as Rates
    from .settings import Reward as Reward
    from .settings import Settings as Settings

_HOMES = {
    "Plan": "planner",
    "Rates": "settings",
    "Reward": "settings",
    "Settings": "settings",
    "choose": "attention",
    "plan": "planner",
    "profile": "profiler",
    "profile_recipe": "profiler",
}
_MODULES = ("attention", "checkpointing", "solve", "specs", "trace")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
