"""A projection of GELU's result that keeps what GELU read: the backward makes activation and gradients in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels.common.modulation import token_sum
from ..kernels.gelu_tanh import reference
from ._block import Cost, check_autocast, check_operand, register_flops, triton_module
from ._checks import check_float
from ._library import linked, register
from .gelu_tanh import backward_op, check_arguments, forward_op, joint_out, rows_of


def _gradients_fake(
    grad: Tensor, x: Tensor, prefix: Tensor | None, bias: bool, *unused: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    bias_sum = x.new_empty(x.shape[-1]) if bias else None
    return joint_out(x, prefix), joint_out(x, None), bias_sum


def _gradients_impl(
    grad: Tensor, x: Tensor, prefix: Tensor | None, bias: bool, mode: str, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    triton = triton_module("gelu_tanh", backend, x)
    if triton and mode == "fast":
        outputs = _gradients_fake(grad, x, prefix, bias)
        triton.gradients(grad, x, prefix, *outputs)
        return outputs
    # torch's own kernels and sum, whose bits are eager's.
    activation = joint_out(x, prefix)
    reference.gelu_tanh(x, prefix, activation)
    grad_x = reference.gelu_tanh_gradient(grad, x)
    return activation, grad_x, token_sum(grad_x) if bias else None


_gradients_op = register(
    "gelu_tanh_gradients(Tensor grad, Tensor x, Tensor? prefix, bool bias, str mode, str backend)"
    " -> (Tensor activation, Tensor grad_x, Tensor bias_sum)",
    _gradients_impl,
    _gradients_fake,
)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        prefix: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        h_bias: Tensor | None,
        mode: str,
        backend: str,
    ) -> Tensor:
        ctx.settings = mode, backend
        ctx.width = 0 if prefix is None else prefix.shape[-1]
        by_h, _, by_weight, _, by_h_bias = ctx.needs_input_grad[:5]
        ctx.save_for_backward(h if by_h or by_weight or by_h_bias else None, prefix if by_weight else None, weight)
        return F.linear(forward_op(h, prefix, mode, backend), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, prefix, weight = ctx.saved_tensors
        by_h, by_prefix, by_weight, by_bias, by_h_bias = ctx.needs_input_grad[:5]
        rows = grad.reshape(-1, grad.shape[-1])
        activation = grad_h = grad_prefix = grad_weight = grad_h_bias = None
        if by_h or by_prefix or by_h_bias:
            # The products of addmm's own gradients: another layout of the operands could give other bits.
            joint = rows.mm(weight).view(*grad.shape[:-1], weight.shape[1])
            grad_prefix = joint[..., : ctx.width] if by_prefix else None
            own = joint[..., ctx.width :]
        if by_weight and (by_h or by_h_bias):
            activation, grad_h, total = _gradients_op(own, h, prefix, by_h_bias, *ctx.settings)
            grad_h_bias = total if by_h_bias else None
        elif by_weight:
            activation = forward_op(h, prefix, *ctx.settings)
        elif by_h or by_h_bias:
            grad_h = backward_op(own, h, *ctx.settings)
            grad_h_bias = token_sum(grad_h) if by_h_bias else None
        if activation is not None:
            grad_weight = rows.t().mm(activation.view(-1, weight.shape[1]))
        grad_bias = rows.sum(0) if by_bias else None
        return grad_h if by_h else None, grad_prefix, grad_weight, grad_bias, grad_h_bias, None, None


def gelu_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    prefix: Tensor | None = None,
    h_bias: Tensor | None = None,
    mode: str = "fast",
    backend: str = "auto",
) -> Tensor:
    """`linear([prefix, gelu_tanh(h)], weight, bias)`, keeping h and the prefix, not what the projection reads.

    Args:
        h: `[..., N]`, float dtypes.
        weight, bias: `[C, P + N]` and `[C]` or None, of h's dtype.
        prefix: `[..., P]` of h's dtype, before the activation; attention keeps its output anyway.
        h_bias: `[N]`, the bias of the layer that made h, where h was computed with this bias detached: its gradient,
            the sum of h's, comes from here. Its values are not read.
        mode, backend: as for `gelu_tanh`; "lossless" has the bits of eager torch in every gradient.

    Returns:
        `[..., C]`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range, or a call under autocast.
    """
    check_arguments(h, prefix, mode, backend, "h")
    check_autocast(h)
    width = h.shape[-1] + (0 if prefix is None else prefix.shape[-1])
    check_float("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, want [C, {width}]")
    given = f"h of {tuple(h.shape)} and {'no prefix' if prefix is None else f'prefix of {prefix.shape[-1]}'}"
    check_operand("weight", weight, (weight.shape[0], width), h.dtype, ("h", h), given)
    check_operand("bias", bias, (weight.shape[0],), h.dtype, ("h", h), given)
    check_operand("h_bias", h_bias, (h.shape[-1],), h.dtype, ("h", h), given)
    out: Tensor = linked(_GeluLinear, h, prefix, weight, bias, h_bias, mode, backend)
    return out


def cost(rows: int, channels: int, itemsize: int, *, prefix: int = 0, h_bias: bool = True, mode: str = "fast") -> Cost:
    """Cost of a call beside its matrix products, with all gradients.

    The backward of "lossless" on a GPU is torch's kernels one after another, of "fast" one kernel.
    """
    elements, copied = rows * channels, rows * prefix
    summed = channels if h_bias else 0
    passes = 4 if mode == "fast" else 6 if h_bias else 5
    return Cost(
        9 * elements,
        (20 if mode == "fast" else 27) * elements + (elements if h_bias else 0),
        2 * (elements + copied) * itemsize,
        (passes * elements + 2 * copied + summed) * itemsize,
        (elements + copied) * itemsize,
    )


def _flops_gradients(grad: Tensor, x: Tensor, prefix: Any, bias: bool, mode: str, *unused: Any, **_: Any) -> int:
    return cost(*rows_of(x), h_bias=bias, mode=mode).flops_backward


register_flops("gelu_tanh_gradients", _flops_gradients)
