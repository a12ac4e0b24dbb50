"""The gated residual of a transformer block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.common import modulation as reference
from ._block import (
    Cost,
    as_rows,
    check_operand,
    check_parameter,
    check_settings,
    check_split,
    check_tokens,
    check_tokens_like,
    contiguous_like,
    empty_unless,
    reference_gradients,
    register_flops,
    triton_module,
    unpacked,
)
from ._checks import check_float
from ._library import checked_once, linked, needs_graph, register
from .selfcheck import Slice, Subject, kind, parameter_kind, trusted


def _by_triton(triton: Any, x: Tensor, y: Tensor, gate: Tensor, split: int, mode: str) -> tuple[Tensor]:
    out = _forward_fake(x)
    triton.forward(x, y, gate, split, mode, out)
    return (out,)


def _by_reference(x: Tensor, y: Tensor, gate: Tensor, split: int, mode: str) -> tuple[Tensor]:
    return (reference.gated_residual(x, y, gate, split, mode == "fast").contiguous(),)


def _sliced(x: Tensor, y: Tensor, gate: Tensor, split: int, mode: str) -> tuple[Any, ...]:
    """Of the forward's arguments, or the backward's (gradient, y, gate)."""
    part = Slice(x.shape[1], x.shape[2], split)
    return part.tokens(x), part.tokens(y), part.parameter(gate), part.split, mode


_FORWARD = Subject("gated_residual", "forward", _by_triton, _by_reference, _sliced, lambda *arguments: (True,))


def forward(x: Tensor, y: Tensor, gate: Tensor, split: int, mode: str, backend: str) -> Tensor:
    """The op's implementation, and of the first of `norm_modulate`'s two parts where one kernel cannot be both."""
    if triton := triton_module("gated_residual", backend, x, y, gate):
        signature = (x.dtype, x.shape[2], y.dtype, parameter_kind(gate, split))
        if mode == "fast" or trusted(_FORWARD, triton, signature, x.device, x, y, gate, split, mode, backend):
            return _by_triton(triton, x, y, gate, split, mode)[0]
    return _by_reference(x, y, gate, split, mode)[0]


def _forward_fake(x: Tensor, *unused: Any) -> Tensor:
    return contiguous_like(x)


def _backward_outputs(grad: Tensor, gate: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    return [empty_unless(wanted[0], grad), empty_unless(wanted[1], gate), empty_unless(wanted[2], grad[0, 0])]


def _through(wanted: Sequence[bool]) -> list[bool]:
    """Without y's bias, but with y, whose sum its gradient is."""
    return [wanted[0] or wanted[2], wanted[1], False]


def _with_sum(found: list[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """What is wanted of the gradients of `_through`; the bias's is torch's own sum, whose bits are eager's."""
    by_y, by_gate, *_ = found
    return [by_y if wanted[0] else None, by_gate, reference.token_sum(by_y) if wanted[2] and by_y is not None else None]


def _backward_by_triton(
    triton: Any, grad: Tensor, y: Tensor | None, gate: Tensor, split: int, mode: str, wanted: Sequence[bool]
) -> list[Tensor | None]:
    apart = mode == "lossless"
    outputs = _backward_outputs(grad, gate, _through(wanted) if apart else wanted)
    triton.backward(grad, y, gate, split, mode, outputs)
    return _with_sum(outputs, wanted) if apart else outputs


def _backward_by_reference(
    grad: Tensor, y: Tensor | None, gate: Tensor, split: int, mode: str, wanted: Sequence[bool]
) -> list[Tensor | None]:
    zeros = torch.zeros((), dtype=grad.dtype, device=grad.device).expand(grad.shape)

    def gated(y: Tensor, gate: Tensor) -> Tensor:
        return reference.gated_residual(zeros, y, gate, split, mode == "fast")

    found = reference_gradients(gated, (grad if y is None else y, gate), _through(wanted)[:2], (grad,))
    return _with_sum(found, wanted)


_BACKWARD = Subject(
    "gated_residual",
    "backward",
    _backward_by_triton,
    _backward_by_reference,
    lambda *arguments: (*_sliced(*arguments[:5]), arguments[5]),
    # The gate's is a sum over tokens, unless each has its own.
    lambda grad, y, gate, split, mode, wanted: (True, parameter_kind(gate, split)[1] == "token", False),
)


def _backward_impl(
    grad: Tensor, y: Tensor | None, gate: Tensor, split: int, mode: str, wanted: Sequence[bool], backend: str
) -> list[Tensor | None]:
    arguments = grad, y, gate, split, mode, wanted
    found = None
    if triton := triton_module("gated_residual", backend, grad, y, gate):
        signature = (grad.dtype, grad.shape[2], kind(y), parameter_kind(gate, split), tuple(wanted))
        if mode == "fast" or trusted(_BACKWARD, triton, signature, grad.device, *arguments, backend):
            found = _backward_by_triton(triton, *arguments)
    return _backward_by_reference(*arguments) if found is None else found


def _backward_fake(grad: Tensor, y: Tensor | None, gate: Tensor, *rest: Any) -> list[Tensor | None]:
    return _backward_outputs(grad, gate, rest[2])


_forward_op = register(
    "gated_residual(Tensor x, Tensor y, Tensor gate, SymInt split, str mode, str backend) -> Tensor",
    forward,
    _forward_fake,
)
backward_op = register(
    "gated_residual_backward(Tensor grad, Tensor? y, Tensor gate, SymInt split, str mode, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ungated: bool,
        y_bias: Tensor | None,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        split: int,
        mode: str,
        backend: str,
    ) -> Tensor:
        ctx.settings = split, mode, backend
        ctx.ungated = ungated
        _, by_y_bias, _, by_y, by_gate, *_ = ctx.needs_input_grad
        ctx.wanted = [by_y and not ungated, by_gate, by_y_bias]
        # y is needed for the gate's gradient alone.
        ctx.save_for_backward(y if ctx.wanted[1] else None, gate)
        return _forward_op(x, y, gate, split, mode, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split, mode, backend = ctx.settings
        grad_y = grad_gate = grad_bias = None
        if ctx.ungated:
            grad_y = grad
        elif any(ctx.wanted):
            grad_y, grad_gate, grad_bias = unpacked(
                backward_op(grad, *ctx.saved_tensors, split, mode, ctx.wanted, backend),
                ctx.wanted,
            )
        return None, grad_bias, grad, grad_y, grad_gate, None, None, None


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    y_bias: Tensor | None = None,
    split: int | None = None,
    mode: str = "fast",
    backend: str = "auto",
) -> Tensor:
    """`x + gate y`, keeping y where the gate needs a gradient, and else nothing.

    Args:
        x, y: `[B, S, C]`, the residual stream and what is added to it; float dtypes, any strides.
        gate: `[B, C]`, `[B, S, C]`, or `[B, 2, C]` with `split`.
        y_bias: `[C]` of y's dtype, the bias of the layer that made y, where y was computed with this bias detached: its
            gradient, the sum of y's, comes from here. Its values are not read.
        split: tokens before it use row 0 of the gate, those from it on row 1.
        mode: "fast" rounds once; "lossless" rounds the product too, as eager torch does.
        backend: "auto" (Triton on a GPU, else plain torch), "triton" or "reference".

    Returns:
        `[B, S, C]` in x's dtype.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    return call(x, y, gate, split, mode, backend, y_bias)


@checked_once
def _checked(
    x: Tensor, y: Tensor, gate: Tensor, split: int | None, mode: str, backend: str, y_bias: Tensor | None
) -> int:
    """Where the gate's second row starts."""
    check_tokens("x", x)
    check_tokens_like("y", y, x, "x")
    check_float("gate", gate)
    check_settings(mode, backend)
    check_parameter("gate", gate, x, split)
    check_operand("y_bias", y_bias, (x.shape[-1],), y.dtype, ("x", x), f"y of {tuple(y.shape)}")
    return check_split(split, x)


def call(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    split: int | None,
    mode: str,
    backend: str,
    y_bias: Tensor | None = None,
    ungated: bool = False,
) -> Tensor:
    """The op; `ungated` hands y the gradient of `gate y` instead of its own, and needs a gate without a gradient."""
    start, rows = _checked(x, y, gate, split, mode, backend, y_bias), as_rows(gate)
    assert rows is not None
    if not needs_graph(x, y, gate, y_bias):
        return _forward_op(x, y, rows, start, mode, backend)
    out: Tensor = linked(_GatedResidual, ungated, y_bias, x, y, rows, start, mode, backend)
    return out


def cost(
    batch: int, tokens: int, channels: int, itemsize: int, *, gate_grad: bool = True, y_bias: bool = False
) -> Cost:
    """Cost of a call; rows of the gate, and the bias, are left out. `itemsize` in bytes."""
    elements = batch * tokens * channels
    kept = elements * itemsize if gate_grad else 0
    flops = (3 if gate_grad else 1) + (1 if y_bias else 0)
    return Cost(2 * elements, flops * elements, 3 * elements * itemsize, 2 * elements * itemsize + kept, kept)


def _flops(x: Tensor, *unused: Any, **_: Any) -> int:
    batch, tokens, channels = x.shape
    return cost(batch, tokens, channels, x.element_size()).flops_forward


def _flops_backward(grad: Tensor, y: Tensor | None, *rest: Any, **_: Any) -> int:
    batch, tokens, channels = grad.shape
    counted = cost(batch, tokens, channels, grad.element_size(), gate_grad=y is not None, y_bias=rest[3][2])
    return counted.flops_backward


register_flops("gated_residual", _flops)
register_flops("gated_residual_backward", _flops_backward)
