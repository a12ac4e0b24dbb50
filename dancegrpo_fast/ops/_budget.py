"""How far a result may lie from the truth: twice the sum of plain torch's error and one rounding of the output."""

import torch
from torch import Tensor


def one_rounding(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of `dtype` at each value, subnormals included."""
    info = torch.finfo(dtype)
    return 0.5 * info.eps * truth.abs().clamp(min=info.smallest_normal)


def budget(truth: Tensor, plain: Tensor, source: float = 0.0) -> Tensor:
    """The distance from `truth` that is allowed, float64 of its shape.

    Args:
        truth: float64.
        plain: what plain torch computes in the dtype that is judged; its worst error counts, where both are finite.
        source: an error that counts where plain torch is right by luck.
    """
    finite = truth.isfinite() & plain.isfinite()
    error = torch.where(finite, (plain.double() - truth).abs(), 0.0).amax() if truth.numel() else truth.new_zeros(())
    return 2.0 * (error.clamp(min=source) + one_rounding(truth, plain.dtype))
