"""Compiled kernels and a thin trainer for GRPO on image and video generators.

    import dancegrpo_fast as dgf

Public names load on first use; importing the package loads neither torch, triton, CUDA nor diffusers.
"""

from typing import TYPE_CHECKING

from .lazy import lazy

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

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "advantages": ("group_advantages",),
        "ops.noise": ("gaussian_noise",),
        "ops.policy_loss": ("PolicyLoss", "PolicyMetrics", "policy_loss"),
        "ops.transition": ("TransitionStep", "transition_log_prob", "transition_step"),
        "patch": ("accelerate",),
        "transitions": ("TransitionTable",),
    },
    (
        *("activations", "advantages", "attention", "backends", "compat", "demo", "dropin", "evaluate", "lora"),
        *("marks", "memory", "models", "ops", "patch", "plugins", "processes", "profile", "prompts", "quantization"),
        *("recipe", "rewards", "rng", "run", "sequence", "stopping", "train", "transitions"),
    ),
)
