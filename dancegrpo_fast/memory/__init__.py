"""Predicts, chooses and measures memory: real diffusers models on fake tensors.

from dancegrpo_fast import memory

found = memory.plan(memory.Settings("hunyuan-video", frames=53, height=480, width=640, lora=32))
print(found.table())

Public names load on first use; importing this loads neither torch nor diffusers by itself.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from ..attention.choice import choose as choose
    from ..profile.profiler import profile as profile
    from ..profile.profiler import profile_recipe as profile_recipe
    from .planning.cards import Rates as Rates
    from .planning.planner import Plan as Plan
    from .planning.planner import plan as plan
    from .planning.rewards import Reward as Reward
    from .planning.settings import Settings as Settings

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "planning.planner": ("Plan", "plan"),
        "planning.cards": ("Rates",),
        "planning.rewards": ("Reward",),
        "planning.settings": ("Settings",),
        ".attention": ("choose",),
        ".profile": ("profile", "profile_recipe"),
    },
    {
        "attention": ".attention",
        "checkpointing": ".activations.checkpointing",
        "solve": "planning.solve",
        "specs": "planning.specs",
        "trace": "trace",
    },
)
