"""GELU by Triton: one launch a call."""

from typing import Any

from torch import Tensor

from .. import backends
from ..kernels.gelu_tanh import triton_kernels as kernels
from . import _triton

# 16 elements a thread: two 16-byte accesses of 16-bit numbers under way.
BLOCK, THREAD = 2048, 16


def _rows(x: Tensor, whole: bool) -> Tensor:
    """Two dimensions, the last one kept unless `whole`; copied only where the others do not merge."""
    return x.reshape(1, -1) if whole else x.reshape(-1, x.shape[-1])


def _settings(width: int) -> dict[str, Any]:
    block = min(BLOCK, max(32, 1 << (width - 1).bit_length()))
    return {
        "interpreted": backends.interpreting(),
        "block": block,
        "num_warps": max(1, block // (32 * THREAD)),
        "enable_fp_fusion": False,
    }


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
    _triton._launch_on(x.device, kernels.forward_kernel, len(rows) * (copied + parts), arguments, settings)


def backward(grad: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """Writes the gradient by x."""
    whole = grad.is_contiguous() and x.is_contiguous()
    given, rows = _rows(grad, whole), _rows(x, whole)
    settings = _settings(rows.shape[1])
    parts = -(-rows.shape[1] // settings["block"])
    arguments = (given, *given.stride(), rows, *rows.stride(), rows.shape[1], grad_x, parts)
    _triton._launch_on(x.device, kernels.backward_kernel, len(rows) * parts, arguments, settings)
