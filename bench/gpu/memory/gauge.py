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
        peak: of forward and backward.
        saved: from the forward to the backward, without the output.
        reserved: of the device in all, by the caching allocator; None on a CPU.
    """

    peak: int
    saved: int
    reserved: int | None


def on_cuda(call: Call, cuda: Any = torch.cuda) -> Taken:
    """Of the second of two calls with their backward.

    Args:
        call: the forward; returns the output.
        cuda: torch's, or what stands for it.
    """
    for _ in range(2):
        gc.collect()
        cuda.synchronize()
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        output = call()
        gradient = torch.ones_like(output)
        kept = cuda.memory_allocated() - before - output.untyped_storage().nbytes() - gradient.nbytes
        output.backward(gradient)
        cuda.synchronize()
        taken = Taken(cuda.max_memory_allocated() - before, kept, cuda.max_memory_reserved())
        # The next call must not find them there.
        del output, gradient
    return taken


def of_model(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> Taken:
    """Of a training call with gradients there before; on the CPU by the ledger of `bench.memory`."""
    if device.type == "cpu":
        account = measure(model, inputs, train=True)
        return Taken(account.peak - account.fixed, account.saved, None)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None

    def call() -> Tensor:
        output: Tensor = model(**inputs)[0]
        return output

    return on_cuda(call)
