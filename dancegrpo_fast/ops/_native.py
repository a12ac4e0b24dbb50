"""How tensors are handed to the compiled module: addresses, dtype codes and strides."""

from typing import Any

import torch
from torch import Tensor

from ..backends import threads_for

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def operand(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """`[B, ...]` as the module reads it; contiguous samples go without sizes."""
    if tensor is None:
        return None
    code = DTYPE_CODES[tensor.dtype]
    # The first test is the cheap one: indexing builds a view.
    if tensor.is_contiguous() or tensor[0].is_contiguous():
        return tensor.data_ptr(), code, tensor.stride(0)
    return tensor.data_ptr(), code, tensor.stride(0), tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])


def transition(
    latents: Tensor,
    output: Tensor,
    uncond: Tensor | None,
    next_latents: Tensor,
    table: Tensor,
    step: Tensor | None,
    step_index: int,
    guidance_scale: float,
    reference_rounding: bool,
) -> tuple[Any, ...]:
    """The arguments every entry point of the module shares. `step` must be contiguous and outlive the call."""
    batch = latents.shape[0]
    return (
        operand(latents),
        operand(output),
        operand(uncond),
        operand(next_latents),
        batch,
        latents.numel() // batch,
        table.data_ptr(),
        table.shape[0],
        address(step),
        step_index,
        guidance_scale,
        reference_rounding,
        threads_for(latents.numel()),
    )


def address(tensor: Tensor | None) -> int:
    """A contiguous tensor's address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
