"""The model as it starts, beside the one that is trained."""

import copy

import torch
from torch import Tensor, nn

from .. import lora
from ..compiling import compile_denoiser
from ..processes import Processes
from .calls import Inputs, Policy


class Reference:
    """A frozen copy of the denoiser; where LoRA layers are trained, the denoiser without them, or with those it had.

    Args:
        denoiser: as loaded, before it is prepared.
        processes: prepare the copy as they do the policy, so that both run in the same precision.
        adapters: the denoiser has LoRA layers.
        started: these are not new: they have a frozen copy, too.
        compiled: `model.compile`, which a copy has as the policy has it.
    """

    def __init__(
        self, denoiser: nn.Module, processes: Processes, *, adapters: bool, started: bool, compiled: str | None = None
    ) -> None:
        self._started = adapters and started
        if self._started:
            lora.keep_start(denoiser)
        frozen = None if adapters else copy.deepcopy(denoiser).requires_grad_(False)
        self._copy = None if frozen is None else processes.prepare(frozen)
        if self._copy is not None and compiled is not None:
            compile_denoiser(self._copy, compiled)

    @torch.no_grad()
    def __call__(self, policy: Policy, denoiser: nn.Module, inputs: Inputs) -> Tensor:
        """Guided outputs, float32 `[n, ...]`; `denoiser` is what the update calls."""
        if self._copy is not None:
            return policy.guided(*policy(self._copy, *inputs), inputs[-1])
        adapted = lora.adapted(policy.model.denoiser)
        for one in adapted:
            if self._started:
                one.set_adapter(lora.START)
            else:
                one.disable_adapters()
        try:
            return policy.guided(*policy(denoiser, *inputs), inputs[-1])
        finally:
            for one in adapted:
                if self._started:
                    one.set_adapter(lora.ADAPTER)
                else:
                    one.enable_adapters()
