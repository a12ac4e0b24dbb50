"""GELU by Triton: one launch a call, and a small one for sums over tokens."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..kernels.gelu_tanh import triton_kernels as kernels
from ._launch import launch_on, planned
from ._triton_gated_residual import Chunks
from ._triton_gated_residual import rows_of as operand

# 16 elements a thread: two 16-byte accesses of 16-bit numbers under way.
BLOCK, THREAD = 2048, 16
# Of the pass that writes two tensors, whose programs take several rows: 8 elements a thread.
ROWS_BLOCK, ROWS_THREAD = 1024, 8


def _rows(x: Tensor, whole: bool) -> Tensor:
    """Two dimensions, the last one kept unless `whole`; copied only where the others do not merge."""
    return x.reshape(1, -1) if whole else x.reshape(-1, x.shape[-1])


def _settings(width: int, most: int = BLOCK, thread: int = THREAD) -> dict[str, Any]:
    block = min(most, max(32, 1 << (width - 1).bit_length()))
    # Instructions of an NVIDIA GPU, which neither the interpreter nor another maker's compiler knows.
    ptx = torch.version.hip is None and not backends.interpreting()
    return {"ptx": ptx, "block": block, "num_warps": max(1, block // (32 * thread))}


@planned
def forward(x: Tensor, prefix: Tensor | None, out: Tensor) -> None:
    """Writes the prefix and, behind it, `gelu(x)`."""
    copied_width = 0 if prefix is None else prefix.shape[-1]
    rows = _rows(x, copied_width == 0 and x.is_contiguous())
    head = None if prefix is None or copied_width == 0 else _rows(prefix, False)
    settings = _settings(max(rows.shape[1], copied_width))
    copied, parts = (-(-width // settings["block"]) for width in (copied_width, rows.shape[1]))
    arguments = (
        *(rows, *rows.stride(), rows.shape[1]),
        *(head, *((0, 0) if head is None else head.stride()), copied_width),
        *(out, copied_width + rows.shape[1], copied + parts, copied),
    )
    launch_on(x.device, kernels.forward_kernel, len(rows) * (copied + parts), arguments, settings)


@planned
def backward(grad: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """Writes the gradient by x."""
    whole = grad.is_contiguous() and x.is_contiguous()
    given, rows = _rows(grad, whole), _rows(x, whole)
    settings = _settings(rows.shape[1])
    parts = -(-rows.shape[1] // settings["block"])
    arguments = (given, *given.stride(), rows, *rows.stride(), rows.shape[1], grad_x, parts)
    launch_on(x.device, kernels.backward_kernel, len(rows) * parts, arguments, settings)


@planned
def gradients(
    grad: Tensor, x: Tensor, prefix: Tensor | None, activation: Tensor, grad_x: Tensor, bias_sum: Tensor | None
) -> None:
    """Writes the prefix and `gelu(x)` behind it, the gradient by x and, where asked for, its sum over all rows."""
    width = 0 if prefix is None else prefix.shape[-1]
    given, rows, results, by_x = (_rows(t, False).unsqueeze(0) for t in (grad, x, activation, grad_x))
    copied = None if prefix is None or width == 0 else _rows(prefix, False).unsqueeze(0)
    settings = _settings(max(rows.shape[-1], width), ROWS_BLOCK, ROWS_THREAD)
    before, parts = (-(-n // settings["block"]) for n in (width, rows.shape[-1]))
    chunks = Chunks(rows, -1, [], [bias_sum])
    arguments = (
        *(operand(given), operand(rows), operand(copied)),
        *(None if copied is None else operand(results[..., :width]), operand(results[..., width:]), operand(by_x)),
        *(None if bias_sum is None else chunks.target(bias_sum), chunks.tokens, chunks.channels, width),
        *(chunks.length, before + parts, before),
    )
    programs = chunks.count * (before + parts)
    launch_on(x.device, kernels.gradients_kernel, programs, arguments, settings)
    chunks.finish()
