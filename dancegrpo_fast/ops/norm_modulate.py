"""LayerNorm or RMSNorm of tokens with modulation, after an optional gated residual: one pass each way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_choice, check_dtype, check_int
from ._block import (
    Cost,
    as_rows,
    check_channels,
    check_eps,
    check_operand,
    check_parameter,
    check_settings,
    check_split,
    check_tokens,
    check_tokens_like,
    prepare,
    register_flops,
    saved,
    unpacked,
)
from ._library import checked_once, linked, needs_graph, register
from ._norm_modulate import backward, backward_fake, forward, forward_fake
from .gated_residual import backward_op as gated_backward_op

NORMS = ("layer", "rms")
NORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the parameters: x, y, gate, scale, shift, weight, bias.
INPUTS = 7

_SETTINGS = "SymInt split, str norm, float eps, str mode, ScalarType? norm_dtype"


_forward_op = register(
    "norm_modulate(Tensor x, Tensor? y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias,"
    f" {_SETTINGS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    forward_fake,
)
_backward_op = register(
    "norm_modulate_backward(Tensor? grad_h, Tensor[] grads, Tensor h, Tensor? mean, Tensor rstd, Tensor? y,"
    f" Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, {_SETTINGS}, bool[] wanted,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    backward_fake,
)


class _NormModulate(torch.autograd.Function):
    """Gives the residual stream and the modulated tokens, these once for each consumer."""

    @staticmethod
    def forward(
        ctx: Any,
        consumers: int,
        ungated: bool,
        settings: tuple[Any, ...],
        y_bias: Tensor | None,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        h, out, mean, rstd = _forward_op(x, y, gate, *parameters, *settings)
        ctx.settings = settings
        prepare(ctx)
        # A bias counts for nothing but its gradient.
        ctx.wanted = [*ctx.needs_input_grad[4:], ctx.needs_input_grad[3]]
        ctx.ungated = ungated and ctx.wanted[1]
        if ctx.ungated:
            ctx.wanted[:2] = True, False
        h = x if y is None or h is None else h
        # The gated tensor is needed for the gate's gradient alone, as long as that is of both.
        ctx.save_for_backward(h, mean, rstd, y if ctx.wanted[2] and not ctx.ungated else None, gate, *parameters)
        # An alias, so that the residual's gradient comes here and is added on the way.
        residual = h.detach()
        if not any(ctx.wanted[:3]):
            ctx.mark_non_differentiable(residual)
        return out, *(out.detach() for _ in range(consumers - 1)), residual

    @staticmethod
    def recompute(kept: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Tensor, ...]:
        h, _, _, _, _, *parameters = kept
        return (_forward_op(h, None, None, *parameters, *settings)[1],)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *each, grad_h = gradients
        grads = [g for g in each if g is not None]
        h, mean, rstd, y, gate, *parameters = saved(ctx)
        *settings, backend = ctx.settings
        if grads:
            found = _backward_op(grad_h, grads, h, mean, rstd, y, gate, *parameters, *settings, ctx.wanted, backend)
            grad_x, grad_y, *more, grad_bias = unpacked(found, ctx.wanted)
            return None, None, None, grad_bias, grad_x, grad_x if ctx.ungated else grad_y, *more
        if grad_h is None:
            return (None,) * (4 + INPUTS)
        grad_y = grad_h if ctx.ungated else None
        grad_gate = grad_bias = None
        wanted = [*ctx.wanted[1:3], ctx.wanted[7]]
        if any(wanted) and not ctx.ungated:
            split, mode = settings[0], settings[3]
            grad_y, grad_gate, grad_bias = unpacked(
                gated_backward_op(grad_h, y, gate, split, mode, wanted, backend), wanted
            )
        return None, None, None, grad_bias, grad_h, grad_y, grad_gate, None, None, None, None


@checked_once
def _checked(*arguments: Any) -> tuple[float, int, int]:
    """Of `call`'s arguments `eps`, where the second rows of parameters start, and `consumers`."""
    x, y, gate, scale, shift, weight, bias, y_bias, norm, eps, split, mode, norm_dtype, consumers, backend = arguments
    check_tokens("x", x)
    check_settings(mode, backend)
    eps = check_eps(eps)
    check_choice("norm", norm, NORMS)
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(f"{missing}: got None, want both scale and shift or neither")
    if norm_dtype is not None:
        check_dtype("norm_dtype", norm_dtype, NORM_DTYPES)
    consumers = check_int("consumers", consumers, 1)
    check_channels("weight", weight, x)
    check_channels("bias", bias, x)
    start = check_split(split, x)
    for name, value in (("gate", gate), ("scale", scale), ("shift", shift)):
        check_parameter(name, value, x, split)
    if y is not None:
        check_tokens_like("y", y, x, "x")
        check_operand("y_bias", y_bias, (x.shape[-1],), y.dtype, ("x", x), f"y of {tuple(y.shape)}")
    return eps, start, consumers


def call(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    split: int | None,
    mode: str,
    norm_dtype: torch.dtype | None,
    consumers: int,
    backend: str,
    y_bias: Tensor | None = None,
    ungated: bool = False,
) -> tuple[Tensor, ...]:
    """All forms; `ungated` hands y the gradient of `gate y` instead of its own, and the gate their sum over tokens."""
    tensors = x, y, gate, scale, shift, weight, bias
    eps, start, consumers = _checked(*tensors, y_bias, norm, eps, split, mode, norm_dtype, consumers, backend)
    gate, scale, shift = map(as_rows, (gate, scale, shift))
    settings = start, norm, eps, mode, norm_dtype, backend
    if not needs_graph(*tensors, y_bias):
        h, out, _, _ = _forward_op(x, y, gate, scale, shift, weight, bias, *settings)
        return x if y is None or h is None else h, *(out,) * consumers
    # Compiled graphs fuse what follows by themselves, and aliases would only be in their way.
    count = 1 if torch.compiler.is_compiling() else consumers
    *outs, h = linked(_NormModulate, count, ungated, settings, y_bias, x, y, gate, scale, shift, weight, bias)
    if torch.compiler.is_compiling() and y is None:
        h = x
    return h, *outs * (consumers // count)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    split: int | None = None,
    mode: str = "fast",
    norm_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """`norm(x) (1 + scale) + shift`: the adaptive norm of diffusion transformers (DiT, arXiv 2212.09748).

    Keeps x, and mean and reciprocal deviation of each token; nothing else of x's size.

    Args:
        x: `[B, S, C]`, float32, bfloat16, float16 or float64, any strides.
        scale, shift: `[B, C]`, `[B, S, C]`, or `[B, 2, C]` with `split`; None leaves the norm as it is.
        weight, bias: `[C]`, of an affine norm.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        eps: added to the variance or the mean square.
        split: tokens before it use row 0 of the parameters, those from it on row 1.
        mode: "fast" computes in float32 (float64 for float64 tensors) and rounds once; "lossless" rounds wherever eager
            torch does.
        norm_dtype: what the norm's result is rounded to in "lossless" mode; None is x's dtype, as for `LayerNorm(x)`.
        backend: "auto" (Triton on a GPU, else plain torch), "triton" or "reference".

    Returns:
        `[B, S, C]` in x's dtype.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    return call(x, None, None, scale, shift, weight, bias, norm, eps, split, mode, norm_dtype, 1, backend)[1]


_DEFAULTS: dict[str, Any] = dict(norm_modulate.__kwdefaults__ or {})


def norm_modulate_fanout(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *, consumers: int, **options: Any
) -> tuple[Tensor, ...]:
    """`norm_modulate` whose result goes to several layers while x goes on: `(x, out, ..., out)`.

    The outputs share memory; each consumer takes its own, in the order in which they are called, and the residual path
    takes the returned x. Then the gradients of all of them, and of the residual, are added inside the backward, in the
    order (and, in "lossless" mode, with the rounding) in which autograd adds them.

    Args:
        x, scale, shift, options: as for `norm_modulate`.
        consumers: how many outputs.
    """
    if unknown := set(options) - set(_DEFAULTS):
        raise TypeError(f"norm_modulate_fanout: got unexpected {', '.join(sorted(unknown))}")
    return call(x, None, None, scale, shift, consumers=consumers, **_DEFAULTS | options)


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    y_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    split: int | None = None,
    mode: str = "fast",
    norm_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`h = x + gate y` and `norm(h) (1 + scale) + shift`, in one pass; keeps h, y, and two numbers a token.

    y is kept only where the gate needs a gradient.

    Args:
        x, y: `[B, S, C]`, the residual stream and what is added to it.
        gate: `[B, C]`, `[B, S, C]`, or `[B, 2, C]` with `split`.
        y_bias: as for `gated_residual`.
        scale, shift, weight, bias, norm, eps, split, mode, norm_dtype, backend: as for `norm_modulate`.

    Returns:
        `(h, out)`, both `[B, S, C]` in x's dtype.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    for name, value in (("y", y), ("gate", gate)):
        if value is None:
            raise ValueError(f"{name}: got None, want a torch.Tensor; norm_modulate is the op without y and gate")
    h, out = call(x, y, gate, scale, shift, weight, bias, norm, eps, split, mode, norm_dtype, 1, backend, y_bias)
    return h, out


def cost(
    batch: int,
    tokens: int,
    channels: int,
    itemsize: int,
    *,
    gated: bool = False,
    consumers: int = 1,
    modulation_grads: bool = True,
    norm: str = "layer",
    y_bias: bool = False,
) -> Cost:
    """Cost of `norm_modulate`, or of `gated_residual_norm_modulate` with `gated`; rows of parameters are left out.

    Args:
        batch, tokens, channels, itemsize: of x; `itemsize` in bytes.
        gated: with a gated residual.
        consumers: gradients that the backward adds; the residual's is one more.
        modulation_grads: whether scale and shift (and the gate) need gradients.
        norm: "layer" or "rms".
        y_bias: whether the bias of the layer that made y gets its gradient here.
    """
    rows = batch * tokens
    elements = rows * channels
    statistics = rows * 4 * (2 if norm == "layer" else 1)
    reads, writes = (2, 2) if gated else (1, 1)
    keeps_y = gated and modulation_grads
    backward = consumers + 1 + 1 + 1 + (int(keeps_y) + 1 if gated else 0)
    return Cost(
        elements * ((8 if norm == "layer" else 6) + (2 if gated else 0)),
        elements * ((14 if norm == "layer" else 11) + consumers + (3 if gated else 0) + int(y_bias)),
        elements * itemsize * (reads + writes) + statistics,
        elements * itemsize * backward + statistics,
        elements * itemsize * (1 + int(keeps_y)) + statistics,
    )


def _flops(x: Tensor, y: Tensor | None, *rest: Any, **_: Any) -> int:
    batch, tokens, channels = x.shape
    return cost(batch, tokens, channels, x.element_size(), gated=y is not None, norm=rest[6]).flops_forward


def _flops_backward(grad_h: Tensor | None, grads: Sequence[Tensor], h: Tensor, *rest: Any, **_: Any) -> int:
    batch, tokens, channels = h.shape
    gated, norm, wanted = rest[3] is not None, rest[9], rest[13]
    counted = cost(
        *(batch, tokens, channels, h.element_size()),
        gated=gated,
        consumers=len(grads),
        norm=norm,
        y_bias=gated and wanted[7],
    )
    return counted.flops_backward


register_flops("norm_modulate", _flops)
register_flops("norm_modulate_backward", _flops_backward)
