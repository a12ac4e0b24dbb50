"""The model as it was loaded, beside the one that is trained."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import Processes
from .calls import Inputs, Policy


class Reference:
    """A frozen copy of the denoiser, or where adapters are trained, the denoiser without them.

    Args:
        denoiser: as loaded, before it is prepared.
        processes: prepare the copy as they do the policy, so that both run in the same precision.
        adapters: the denoiser has some.
    """

    def __init__(self, denoiser: nn.Module, processes: Processes, *, adapters: bool) -> None:
        frozen = None if adapters else copy.deepcopy(denoiser).requires_grad_(False)
        self._copy = None if frozen is None else processes.prepare(frozen)

    @torch.no_grad()
    def __call__(self, policy: Policy, denoiser: nn.Module, inputs: Inputs) -> Tensor:
        """Guided outputs, float32 `[n, ...]`; `denoiser` is what the update calls."""
        if self._copy is not None:
            return policy.guided(*policy(self._copy, *inputs))
        adapted: Any = policy.model.denoiser
        adapted.disable_adapters()
        try:
            return policy.guided(*policy(denoiser, *inputs))
        finally:
            adapted.enable_adapters()
