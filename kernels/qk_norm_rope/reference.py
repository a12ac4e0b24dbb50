"""Plain torch definition: RMSNorm of queries or keys, rotary embedding, and the joint buffer of two streams."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.modulation import compute_dtype


def normalized(x: Tensor, weight: Tensor | None, norm: str, eps: float, fast: bool) -> Tensor:
    """RMSNorm of `[B, S, H, D]` over D ("head", "head_twice") or over H D ("token"); "none" leaves x as it is.

    Rounded once at the end as `torch.nn.RMSNorm` does, or, for "head_twice", before the weight too as diffusers' does.
    """
    if norm == "none":
        return x
    if norm == "token":
        rows: Tensor = F.rms_norm(x.flatten(2), (x.shape[2] * x.shape[3],), weight, eps)
        return rows.view(x.shape)
    if norm == "head" or fast:
        heads: Tensor = F.rms_norm(x, x.shape[3:], weight, eps)
        return heads
    variance = x.to(compute_dtype(x.dtype)).pow(2).mean(-1, keepdim=True)
    scaled = x * torch.rsqrt(variance + eps)
    if weight is None:
        return scaled.to(x.dtype)
    if weight.dtype in (torch.float16, torch.bfloat16):
        scaled = scaled.to(weight.dtype)
    return scaled * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor, half_split: bool, once: bool) -> Tensor:
    """Each pair `(a, b)` of a head turned by its angle: `(a cos - b sin, b cos + a sin)`.

    Args:
        x: `[B, S, H, D]`.
        cos, sin: `[R, D]` or, one number a pair, `[R, D / 2]`; tokens from R on are left as they are. Products and
            sums with tables in half precision are rounded as torch's promotion has it.
        half_split: pairs are `(i, i + D / 2)` instead of `(2 i, 2 i + 1)`.
        once: whether the gradient is rounded once, as that of a complex product, or term by term.
    """
    count, dim = len(cos), x.shape[-1]
    head, tail = x[:, :count], x[:, count:]
    if once:
        head = head.to(compute_dtype(x.dtype))

    def pairs(t: Tensor) -> tuple[Tensor, Tensor]:
        first, second = t.unflatten(-1, (2, -1)).unbind(-2) if half_split else t.unflatten(-1, (-1, 2)).unbind(-1)
        return first, second

    def table(t: Tensor) -> tuple[Tensor, Tensor]:
        t = t[None, :, None, :]
        return (t, t) if t.shape[-1] != dim else pairs(t)

    (a, b), (cos_a, cos_b), (sin_a, sin_b) = pairs(head), table(cos), table(sin)
    turned = [a * cos_a - b * sin_a, b * cos_b + a * sin_b]
    out = torch.stack(turned, dim=-2 if half_split else -1).flatten(-2).to(x.dtype)
    return out if count == x.shape[1] else torch.cat([out, tail], dim=1)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    half_split: bool,
    once: bool,
    fast: bool,
) -> Tensor:
    """One stream of queries or keys `[B, S, H, D]`, in x's dtype."""
    out = x
    if fast:
        dtype = compute_dtype(x.dtype)
        out, weight = x.to(dtype), None if weight is None else weight.to(dtype)
    out = normalized(out, weight, norm, eps, fast)
    if cos is not None and sin is not None:
        if fast or once:
            cos, sin = cos.to(compute_dtype(x.dtype)), sin.to(compute_dtype(x.dtype))
        out = rotated(out, cos, sin, half_split, once)
    return out.to(x.dtype)


def reciprocal_rms(x: Tensor, norm: str, eps: float) -> Tensor:
    """`[B, S, H]` (per head) or `[B, S, 1]` (per token) in the compute dtype; empty without a norm."""
    values = x.to(compute_dtype(x.dtype))
    if norm == "none":
        return values.new_empty(0)
    if norm == "token":
        values = values.flatten(2).unsqueeze(2)
    return (values.square().mean(-1) + eps).rsqrt()
