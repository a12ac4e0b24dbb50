"""Plain torch pieces of the block ops: parameters per sample, per segment of tokens, or per token."""

from collections.abc import Callable

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What fast arithmetic is done in: float32, or float64 for float64 tensors."""
    return torch.promote_types(dtype, torch.float32)


def token_sum(grad: Tensor) -> Tensor:
    """Sum over all but the last dimension, as a linear layer's bias gets its gradient."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def by_segment(function: Callable[..., Tensor], tokens: list[Tensor], parameters: list[Tensor], split: int) -> Tensor:
    """`function(*tokens, *parameters)`, with row 0 of `[B, 2, C]` parameters before token `split` and row 1 from there.

    A `split` of -1 means parameters `[B, 1, C]` or `[B, S, C]`.
    """
    if split < 0:
        return function(*tokens, *parameters)
    first = function(*(t[:, :split] for t in tokens), *(p[:, :1] for p in parameters))
    rest = function(*(t[:, split:] for t in tokens), *(p[:, 1:] for p in parameters))
    return torch.cat([first, rest], dim=1)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, split: int, fast: bool) -> Tensor:
    """`x + gate y` in x's dtype; the product is rounded as torch's promotion has it, unless `fast`."""
    if fast:
        dtype = compute_dtype(x.dtype)
        x_in, y, gate = x.to(dtype), y.to(dtype), gate.to(dtype)
    else:
        x_in = x
    return by_segment(lambda a, b, g: a + g * b, [x_in, y], [gate], split).to(x.dtype)
