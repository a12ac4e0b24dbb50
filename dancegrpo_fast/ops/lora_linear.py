"""A linear layer with a LoRA update (Hu et al., arXiv 2106.09685) that keeps its input once and adds in one pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..checks import check_number
from ..kernels.lora_linear import reference
from ._block import (
    Cost,
    check_autocast,
    check_mode,
    check_operand,
    empty_unless,
    register_flops,
    unpacked,
    weight_gradient,
)
from ._checks import check_float
from ._library import linked, needs_graph, register


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# "fast": both products in x's dtype, the update added by the second product of its own.


def _forward_impl(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    inner = F.linear(rows, lora_a.to(x.dtype))
    out = F.linear(rows, weight, bias)
    out.addmm_(inner, lora_b.to(x.dtype).t(), alpha=scale)
    # A view's results may not be changed in place.
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0])), inner


def _forward_fake(x: Tensor, weight: Tensor, bias: Any, lora_a: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((_rows(x).shape[0], lora_a.shape[0]))


def _backward_impl(
    grad: Tensor,
    x: Tensor | None,
    inner: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    by_x, by_weight, by_bias, by_a, _ = wanted
    rows = _rows(grad)
    grad_x = grad_weight = grad_a = grad_b = None
    grad_inner = rows.mm(lora_b.to(grad.dtype)) if by_x or by_a else None
    if by_x and weight is not None and grad_inner is not None:
        grad_x = rows.mm(weight).addmm_(grad_inner, lora_a.to(grad.dtype), alpha=scale)
        grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
    if by_weight and x is not None:
        grad_weight = rows.t().mm(_rows(x))
    if x is not None and grad_inner is not None and by_a:
        grad_a = _scaled(weight_gradient(grad_inner, _rows(x)), scale).to(lora_a.dtype)
    if inner is not None:
        grad_b = _scaled(weight_gradient(rows, inner), scale).to(lora_b.dtype)
    return grad_x, grad_weight, rows.sum(0) if by_bias else None, grad_a, grad_b


def _backward_fake(
    grad: Tensor, x: Any, inner: Any, weight: Any, lora_a: Tensor, lora_b: Tensor, scale: float, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    outputs, inputs = lora_b.shape[0], lora_a.shape[1]
    shapes = ((*grad.shape[:-1], inputs), (outputs, inputs), (outputs,))
    base = [grad.new_empty(shape) if keep else None for shape, keep in zip(shapes, wanted[:3], strict=True)]
    return *base, empty_unless(wanted[3], lora_a), empty_unless(wanted[4], lora_b)


_forward_op = register(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale)"
    " -> (Tensor out, Tensor inner)",
    _forward_impl,
    _forward_fake,
)
_backward_op = register(
    "lora_linear_backward(Tensor grad, Tensor? x, Tensor? inner, Tensor? weight, Tensor lora_a, Tensor lora_b,"
    " float scale, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        by_x, by_weight, _, by_a, by_b = ctx.needs_input_grad[:5]
        out, inner = _forward_op(x, weight, bias, lora_a, lora_b, scale)
        kept = x if by_weight or by_a else None, inner if by_b else None, weight if by_x else None
        ctx.save_for_backward(*kept, lora_a, lora_b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:5])
        found = _backward_op(grad, *ctx.saved_tensors, ctx.scale, wanted)
        return *unpacked(found, wanted), None


# "lossless": peft's own operations on what the base made, in as few passes as have the same bits.


def _factors(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """What multiplies `x A^T`, and what the update: a power of two gives the same bits in both places.

    Below the normal numbers, 1e-38, it has not. Float16 has so few of them that its products may get there.
    """
    power = math.frexp(scale)[0] == 0.5 and 2**-8 <= scale <= 2**8
    return (scale, 1.0) if power and dtype != torch.float16 else (1.0, scale)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _update_impl(base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    inner = F.linear(x.to(lora_a.dtype), lora_a)
    first, last = _factors(scale, lora_b.dtype)
    update = F.linear(_scaled(inner, first), lora_b)
    if last != 1:
        update.mul_(last)
    # Added in the wider dtype and rounded once to base's, as by a sum and a cast behind it.
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    return torch.add(base, update, out=out), inner


def _update_fake(base: Tensor, x: Tensor, lora_a: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    return out, lora_a.new_empty((*x.shape[:-1], lora_a.shape[0]))


def _update_backward_impl(
    grad: Tensor,
    x: Tensor | None,
    inner: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    by_x, by_a, _ = wanted
    first, last = _factors(scale, lora_b.dtype)
    wide = grad.to(lora_b.dtype)
    if last != 1:
        wide = wide.mul(last) if wide is grad else wide.mul_(last)
    rows = _rows(wide)
    grad_x = grad_a = None
    # The products of mm's own gradients: another layout of the operands could give other bits.
    grad_b = None if inner is None else rows.t().mm(_scaled(_rows(inner), first))
    grad_inner = _scaled(rows.mm(lora_b), first) if by_x or by_a else None
    if by_x and grad_inner is not None:
        grad_x = grad_inner.mm(lora_a).view(*grad.shape[:-1], lora_a.shape[1]).to(grad.dtype)
    if x is not None and grad_inner is not None:
        grad_a = grad_inner.t().mm(_rows(x.to(lora_a.dtype)))
    return grad_x, grad_a, grad_b


def _update_backward_fake(
    grad: Tensor, x: Any, inner: Any, lora_a: Tensor, lora_b: Tensor, scale: float, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    grad_x = grad.new_empty((*grad.shape[:-1], lora_a.shape[1])) if wanted[0] else None
    return grad_x, empty_unless(wanted[1], lora_a), empty_unless(wanted[2], lora_b)


_update_op = register(
    "lora_update(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, float scale) -> (Tensor out, Tensor inner)",
    _update_impl,
    _update_fake,
)
_update_backward_op = register(
    "lora_update_backward(Tensor grad, Tensor? x, Tensor? inner, Tensor lora_a, Tensor lora_b, float scale,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _update_backward_impl,
    _update_backward_fake,
)


class _Update(torch.autograd.Function):
    """What peft adds to the base's output; a node of its own, so that x's two gradients are added as in eager torch."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        out, inner = _update_op(base, x, lora_a, lora_b, scale)
        _, _, by_a, by_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if by_a else None, inner if by_b else None, lora_a, lora_b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[1:4])
        grads: Sequence[Tensor | None] = (None,) * 3
        if any(wanted):
            grads = unpacked(_update_backward_op(grad, *ctx.saved_tensors, ctx.scale, wanted), wanted)
        return grad, *grads, None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    for name, value, dimensions, wanted in (
        ("x", x, 2, "[..., K]"),
        ("weight", weight, 2, "[N, K]"),
        ("lora_a", lora_a, 2, "[R, K]"),
    ):
        check_float(name, value)
        if value.ndim < dimensions or (name != "x" and value.ndim != dimensions) or not value.shape[-1]:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, want {wanted}")
    check_autocast(x)
    (outputs, inputs), rank = weight.shape, lora_a.shape[0]
    given = f"weight of {tuple(weight.shape)}"
    check_operand("x", x, (*x.shape[:-1], inputs), weight.dtype, ("weight", weight), given)
    check_operand("bias", bias, (outputs,), weight.dtype, ("weight", weight), given)
    check_operand("lora_a", lora_a, (rank, inputs), lora_a.dtype, ("weight", weight), given)
    given = f"{given} and lora_a of {tuple(lora_a.shape)}"
    check_operand("lora_b", lora_b, (outputs, rank), lora_a.dtype, ("weight", weight), given)


def _has_eager_layout(x: Tensor, lora_a: Tensor) -> bool:
    """Whether autograd's own products have the layout of ours: another could give other bits.

    It turns them round for one row, and multiplies gapped rows by a frozen matrix in batches.
    """
    return x.numel() > x.shape[-1] and (x.is_contiguous() or lora_a.requires_grad)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    mode: str = "fast",
) -> Tensor:
    """`x W^T + b + scale (x A^T) B^T`, keeping x in its own dtype and `x A^T`.

    peft keeps x in the dtype of A and B, a copy for each layer that reads it, and adds in four passes over the output.

    Args:
        x: `[..., K]`, any strides.
        weight, bias: `[N, K]` and `[N]` or None, of x's dtype; frozen or trained.
        lora_a, lora_b: `[R, K]` and `[N, R]` of one dtype, x's or another (float32 over bfloat16 is usual).
        scale: of the update, `alpha / R` in peft.
        mode: "fast" computes in x's dtype, A and B rounded to it as under autocast, and adds into the base's output, so
            that the sum is rounded once; gradients of A and B are summed in float32. "lossless" has the bits of peft's
            operations in the output and in every gradient; a compiled graph has these operations themselves.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a call under autocast.
    """
    check_mode(mode)
    _check(x, weight, bias, lora_a, lora_b)
    return call(x, weight, bias, lora_a, lora_b, check_number("scale", scale), mode)


def call(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, mode: str
) -> Tensor:
    """The op, of arguments that are known to be right."""
    graph = needs_graph(x, weight, bias, lora_a, lora_b)
    out: Tensor
    if mode == "fast":
        given = x, weight, bias, lora_a, lora_b, scale
        out = linked(_LoraLinear, *given) if graph else _forward_op(*given)[0]
    elif torch.compiler.is_compiling() or not _has_eager_layout(x, lora_a):
        out = reference.lora_linear(x, weight, bias, lora_a, lora_b, scale)
    else:
        update = F.linear(x, weight, bias), x, lora_a, lora_b, scale
        out = linked(_Update, *update) if graph else _update_op(*update)[0]
    return out


def cost(
    rows: int,
    inputs: int,
    outputs: int,
    rank: int,
    itemsize: int,
    *,
    lora_itemsize: int = 4,
    scaled: bool = True,
    mode: str = "fast",
) -> Cost:
    """Cost of what a frozen linear layer has besides its own products, with the gradients of x, A and B.

    Args:
        rows, inputs, outputs, rank: of x `[rows, inputs]` and the update `[rows, outputs]`; what is as wide as the rank
            is left out of the bytes that move.
        itemsize, lora_itemsize: bytes of x's and of A's numbers.
        scaled: whether the scale is another number than 1 or, in "lossless", than a power of two.
        mode: as for `lora_linear`.
    """
    forward, backward = _products(rows, inputs, outputs, rank)
    kept = rows * inputs * itemsize + rows * rank * (itemsize if mode == "fast" else lora_itemsize)
    x, out = rows * inputs, rows * outputs
    if mode == "fast":
        # x is read; what the base made is read and written again. In the backward its gradient twice, x's twice, x.
        return Cost(forward, backward, (x + 2 * out) * itemsize, (2 * out + 3 * x) * itemsize, kept)
    cast = 0 if itemsize == lora_itemsize else itemsize + lora_itemsize
    scaling = 2 * lora_itemsize * scaled
    moved = x * (cast + lora_itemsize) + out * (lora_itemsize + scaling + 2 * itemsize + lora_itemsize)
    # The gradient: cast, scaled, read twice. x's: written, cast. x: cast, read.
    back = out * (cast + scaling + 2 * lora_itemsize) + x * (lora_itemsize + cast + cast + lora_itemsize)
    return Cost(forward, backward, moved, back, kept)


def _products(rows: int, inputs: int, outputs: int, rank: int) -> tuple[int, int]:
    """FLOPs of the update forward and backward."""
    once = 2 * rows * rank * (inputs + outputs)
    return once, 2 * once


def _flops(x: Tensor, weight: Tensor, bias: Any, lora_a: Tensor, *unused: Any, **_: Any) -> int:
    rows = x.numel() // x.shape[-1]
    outputs, inputs = weight.shape
    return 2 * rows * outputs * inputs + _products(rows, inputs, outputs, lora_a.shape[0])[0]


def _flops_update(base: Tensor, x: Tensor, lora_a: Tensor, *unused: Any, **_: Any) -> int:
    rows = x.numel() // x.shape[-1]
    return _products(rows, x.shape[-1], base.shape[-1], lora_a.shape[0])[0]


def _flops_backward(grad: Tensor, x: Any, inner: Any, weight: Any, *rest: Any, **_: Any) -> int:
    lora_a, lora_b, _, (by_x, by_weight, by_bias, by_a, by_b) = rest
    rows = grad.numel() // grad.shape[-1]
    base: int = 2 * rows * lora_a.shape[1] * grad.shape[-1] * (by_x + by_weight) + grad.numel() * by_bias
    return base + _flops_update_backward(grad, x, inner, lora_a, lora_b, None, (by_x, by_a, by_b))


def _flops_update_backward(grad: Tensor, x: Any, inner: Any, lora_a: Tensor, *rest: Any, **_: Any) -> int:
    by_x, by_a, by_b = rest[2]
    (rank, inputs), outputs = lora_a.shape, grad.shape[-1]
    widths = outputs * ((by_x or by_a) + by_b) + inputs * (by_x + by_a)
    found: int = 2 * (grad.numel() // outputs) * rank * widths
    return found


register_flops("lora_linear", _flops)
register_flops("lora_linear_backward", _flops_backward)
register_flops("lora_update", _flops_update)
register_flops("lora_update_backward", _flops_update_backward)
