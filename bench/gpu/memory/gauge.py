"""What a call takes on a device."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...memory.ledger import measure

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Taken:
    """Bytes beside what was there before.

    Attributes:
        peak: of the call.
        saved: from the forward to the backward, without the output; 0 where there is no backward.
        allocated, reserved: of the device in all, by tensors and by the caching allocator; None on a CPU.
    """

    peak: int
    saved: int
    allocated: int | None = None
    reserved: int | None = None

    def columns(self) -> dict[str, Any]:
        """Of a row."""
        return {
            "measured_peak_bytes": self.peak,
            "measured_saved_bytes": self.saved,
            "allocated_bytes": self.allocated,
            "reserved_bytes": self.reserved,
        }


def on_cuda(call: Call, cuda: Any = torch.cuda, *, train: bool = True) -> Taken:
    """Of the second of two calls.

    Args:
        call: the forward; returns the output.
        cuda: torch's, or what stands for it.
        train: with their backward; else without gradients.
    """
    for _ in range(2):
        gc.collect()
        cuda.synchronize()
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        kept = 0
        with torch.set_grad_enabled(train):
            output = call()
        if train:
            gradient = torch.ones_like(output)
            kept = cuda.memory_allocated() - before - output.untyped_storage().nbytes() - gradient.nbytes
            output.backward(gradient)
            del gradient
        cuda.synchronize()
        most = cuda.max_memory_allocated()
        taken = Taken(most - before, kept, most, cuda.max_memory_reserved())
        # The next call must not find it there.
        del output
    return taken


def of_model(model: nn.Module, inputs: Mapping[str, Any], device: torch.device, *, train: bool = True) -> Taken:
    """Of a call, in training with gradients there before; on the CPU by the ledger of `bench.memory`."""
    if device.type == "cpu":
        account = measure(model, inputs, train=train)
        return Taken(account.peak - account.fixed, account.saved if train else 0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if train and p.requires_grad else None

    def call() -> Tensor:
        output: Tensor = model(**inputs)[0]
        return output

    return on_cuda(call, train=train)
