"""Plain torch definition: gate a residual, normalise each token, scale and shift it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.modulation import by_segment, compute_dtype


def normalized(h: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """LayerNorm ("layer") or RMSNorm ("rms") over the last dimension, rounded once to h's dtype."""
    shape = h.shape[-1:]
    if norm == "layer":
        return F.layer_norm(h, shape, weight, bias, eps)
    n = F.rms_norm(h, shape, weight, eps)
    return n if bias is None else n + bias


def norm_modulate(
    h: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    split: int,
    norm: str,
    eps: float,
    fast: bool,
    norm_dtype: torch.dtype | None,
) -> Tensor:
    """`norm(h) (1 + scale) + shift` in h's dtype, `[B, S, C]`.

    Unless `fast`, every step is rounded as eager torch does it, with the norm's result in `norm_dtype` (None: h's).
    """
    dtype = compute_dtype(h.dtype) if fast else norm_dtype or h.dtype
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    out = normalized(h.to(dtype), weight, bias, norm, eps)
    if scale is not None and shift is not None:
        if fast:
            scale, shift = scale.to(dtype), shift.to(dtype)
        out = by_segment(lambda n, a, b: n * (1 + a) + b, [out], [scale, shift], split)
    return out.to(h.dtype)


def statistics(h: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Mean (empty for "rms") and reciprocal deviation of each token, `[B, S]` in the compute dtype."""
    values = h.to(compute_dtype(h.dtype))
    if norm == "rms":
        return values.new_empty(0), (values.square().mean(-1) + eps).rsqrt()
    variance, mean = torch.var_mean(values, -1, correction=0)
    return mean, (variance + eps).rsqrt()
