"""A gated residual around an output projection whose result is not kept: the gate's gradient from the weight's."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import gated_residual as plain
from . import norm_modulate
from ._block import check_autocast, check_channels, check_operand, check_tokens, weight_gradient
from ._checks import check_float
from ._library import linked


class _Projection(torch.autograd.Function):
    """`inputs W^T + b` and the gate, whose backward is given the gradient of `gate (inputs W^T + b)`.

    As the gate's gradient it takes that one's sum over tokens, or none and computes it, where there is a bias.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs, weight, bias, gate)
        # In the dtype that sums over tokens come back in.
        wide = gate.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if bias is None:
            ctx.mark_non_differentiable(wide)
        return F.linear(inputs, weight, bias), wide

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, totals: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        inputs, weight, bias, gate = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_inputs = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        grad_gate = torch.empty(gate.shape, dtype=wide, device=gate.device)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=bias.device)
        for sample, (each, x) in enumerate(zip(grad, inputs, strict=True)):
            row = gate[sample].to(wide)
            if grad_inputs is not None:
                # Rows of the weight take the gate, as they are fewer than tokens.
                torch.mm(each, (row[:, None] * weight).to(weight.dtype), out=grad_inputs[sample])
            ungated = weight_gradient(each, x)
            grad_weight.addcmul_(row[:, None], ungated)
            grad_gate[sample] = (ungated * weight).sum(1)
            if bias is not None and grad_bias is not None:
                total = each.sum(0, dtype=wide) if totals is None else totals[sample]
                grad_bias.addcmul_(row, total)
                grad_gate[sample] += bias * total
        return (
            grad_inputs,
            grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            grad_gate.to(gate.dtype),
        )


def _projected(x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The projection, and the gate, whose gradient comes from the projection."""
    check_tokens("x", x)
    check_tokens("inputs", inputs)
    check_autocast(x)
    check_float("gate", gate)
    batch, tokens, channels = x.shape
    like, given = ("x", x), f"x of {tuple(x.shape)} and inputs of {tuple(inputs.shape)}"
    check_operand("inputs", inputs, (batch, tokens, inputs.shape[-1]), x.dtype, like, given)
    check_operand("weight", weight, (channels, inputs.shape[-1]), x.dtype, like, given)
    check_operand("gate", gate, (batch, channels), gate.dtype, like, given)
    check_operand("bias", bias, (channels,), x.dtype, like, given)
    projected: tuple[Tensor, Tensor] = linked(_Projection, inputs, weight, bias, gate)
    return projected


def gated_projection(
    x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, *, backend: str = "auto"
) -> Tensor:
    """`x + gate (inputs W^T + b)`, keeping neither the projection nor its gated form.

    With `G = dout^T inputs` of one sample, `dW = sum_b gate_b G_b`, and `dgate_b = rowsum(W G_b) + b sum(dout)`: what
    the weight's gradient needs anyway gives the gate's too. The weight must need a gradient, or G is extra work.

    Args:
        x: `[B, S, C]`, the residual stream.
        inputs: `[B, S, K]` of the projection.
        weight, bias: `[C, K]` and `[C]` or None.
        gate: `[B, C]`, of any float dtype.
        backend: as for `gated_residual`, whose "fast" arithmetic this is.

    Returns:
        `[B, S, C]` in x's dtype.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a call under autocast; all but the gate must be
            of x's dtype.
    """
    y, gate = _projected(x, inputs, weight, bias, gate)
    # Its backward has no pass that could sum.
    return plain.call(x, y, gate.detach(), None, "fast", backend, ungated=True)


def gated_projection_norm_modulate(
    x: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    norm_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_projection` and the modulated LayerNorm of its result, `(h, out)`, in one pass after the projection.

    Args:
        x, inputs, weight, bias, gate, backend: as for `gated_projection`.
        scale, shift, eps, norm_dtype: as for `norm_modulate`.
        norm_weight, norm_bias: `[C]`, of an affine norm.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a call under autocast.
    """
    y, gate = _projected(x, inputs, weight, bias, gate)
    check_channels("norm_weight", norm_weight, x)
    check_channels("norm_bias", norm_bias, x)
    affine = norm_weight, norm_bias
    h, out = norm_modulate.call(
        x, y, gate, scale, shift, *affine, "layer", eps, None, "fast", norm_dtype, 1, backend, ungated=True
    )
    return h, out
