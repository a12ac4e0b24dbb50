"""Compiled kernels and a thin trainer for GRPO on image and video generators.

    import dancegrpo_fast as dgf

Public names load on first use; importing the package loads neither triton, CUDA nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advantages import group_advantages as group_advantages
    from .ops.noise import gaussian_noise as gaussian_noise
    from .ops.policy_loss import PolicyLoss as PolicyLoss
    from .ops.policy_loss import PolicyMetrics as PolicyMetrics
    from .ops.policy_loss import policy_loss as policy_loss
    from .ops.transition import TransitionStep as TransitionStep
    from .ops.transition import transition_log_prob as transition_log_prob
    from .ops.transition import transition_step as transition_step
    from .patch import accelerate as accelerate
    from .transitions import TransitionTable as TransitionTable

__version__ = "0.1.0"

_HOMES = {
    "accelerate": "patch",
    "group_advantages": "advantages",
    "PolicyLoss": "ops.policy_loss",
    "PolicyMetrics": "ops.policy_loss",
    "policy_loss": "ops.policy_loss",
    "TransitionStep": "ops.transition",
    "gaussian_noise": "ops.noise",
    "transition_log_prob": "ops.transition",
    "transition_step": "ops.transition",
    "TransitionTable": "transitions",
}
_MODULES = ("advantages", "backends", "compat", "memory", "patch", "plugins", "transitions")

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
