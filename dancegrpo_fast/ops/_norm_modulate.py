"""The two implementations of `norm_modulate` and its gradients, and which of them a call gets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.common.modulation import compute_dtype, gated_residual, token_sum
from ..kernels.norm_modulate import reference
from ._block import contiguous_like, empty_unless, reference_gradients, summed, triton_module
from .gated_residual import forward as gated_residual_op
from .selfcheck import SAMPLES, Slice, Subject, kind, parameter_kind, trusted


class Given(NamedTuple):
    """What is done to tokens, in the order of the ops' arguments."""

    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    split: int
    norm: str
    eps: float
    mode: str
    norm_dtype: torch.dtype | None

    def modulated(
        self, h: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The reference's norm of h, with other parameters."""
        settings = self.split, self.norm, self.eps, self.mode == "fast", self.norm_dtype
        return reference.norm_modulate(h, scale, shift, weight, bias, *settings)


# The residual stream where there is a gate, the modulated tokens, mean (of a LayerNorm) and reciprocal deviation.
Outputs = tuple[Tensor | None, Tensor, Tensor | None, Tensor]


def _forward_outputs(x: Tensor, y: Tensor | None, norm: str) -> Outputs:
    out = contiguous_like(x)
    rstd = x.new_empty(x.shape[:2], dtype=compute_dtype(x.dtype))
    return None if y is None else contiguous_like(x), out, torch.empty_like(rstd) if norm == "layer" else None, rstd


def _by_triton(triton: Any, x: Tensor, y: Tensor | None, *rest: Any) -> Outputs:
    outputs = _forward_outputs(x, y, rest[6])
    triton.forward(x, y, Given(*rest), outputs)
    return outputs


def _by_reference(x: Tensor, y: Tensor | None, *rest: Any) -> Outputs:
    given, h = Given(*rest), None
    if y is not None and given.gate is not None:
        h = gated_residual(x, y, given.gate, given.split, given.mode == "fast").contiguous()
    base = x if h is None else h
    out = given.modulated(base, *given[1:5])
    return h, out.contiguous(), *reference.statistics(base, given.norm, given.eps)


def _sliced(x: Tensor, y: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    gate, scale, shift, weight, bias, split, *settings = rest
    part = Slice(x.shape[1], x.shape[2], split)
    rows = map(part.parameter, (gate, scale, shift))
    return part.tokens(x), part.tokens(y), *rows, weight, bias, part.split, *settings


# Two verdicts of one kernel: what a backward computes again has the norm alone.
_GATED = Subject("norm_modulate", "forward", _by_triton, _by_reference, _sliced, lambda *arguments: (True, None))
_NORM = Subject("norm_modulate", "forward", _by_triton, _by_reference, _sliced, lambda *arguments: (None, False))


def _signature(like: Tensor, arguments: Sequence[Any], *operands: Any) -> tuple[Any, ...]:
    """Given (scale, shift, weight, bias, split, norm, eps, mode, norm_dtype)."""
    scale, shift, weight, bias, split, norm, _, _, norm_dtype = arguments
    parameters = (parameter_kind(scale, split), parameter_kind(shift, split), kind(weight), kind(bias))
    return like.dtype, like.shape[2], norm, norm_dtype, *parameters, *operands


def forward(x: Tensor, y: Tensor | None, gate: Tensor | None, *rest: Any) -> Outputs:
    *settings, backend = rest
    arguments = x, y, gate, *settings
    if triton := triton_module("norm_modulate", backend, x, y, gate, *settings[:4]):
        trust = settings[7] == "fast" or trusted(_NORM, triton, _signature(x, settings), x.device, *arguments, backend)
        if trust and y is not None and settings[7] != "fast":
            gated = ("gated", y.dtype, parameter_kind(gate, settings[4]))
            trust = trusted(_GATED, triton, (x.dtype, x.shape[2], *gated), x.device, *arguments, backend)
        if trust:
            return _by_triton(triton, *arguments)
        if y is not None and gate is not None:
            # Each part by its own verdict.
            h = gated_residual_op(x, y, gate, settings[4], settings[7], backend)
            return h, *forward(h, None, None, *rest)[1:]
    return _by_reference(*arguments)


def forward_fake(x: Tensor, y: Tensor | None, *rest: Any) -> Outputs:
    return _forward_outputs(x, y, rest[6])


def _backward_by_triton(triton: Any, grad_h: Tensor | None, grads: Sequence[Tensor], *rest: Any) -> list[Tensor | None]:
    h, mean, rstd, y, *values, wanted = rest
    outputs = _backward_outputs(h, values, wanted)
    triton.backward(grad_h, grads, h, mean, rstd, y, Given(*values), outputs)
    return outputs


def _backward_by_reference(grad_h: Tensor | None, grads: Sequence[Tensor], *rest: Any) -> list[Tensor | None]:
    h, _, _, y, *values, wanted = rest
    given = Given(*values)
    gate, split, fast = given.gate, given.split, given.mode == "fast"
    by_y = wanted[1] or wanted[7]
    through_norm = (wanted[0] or by_y or wanted[2], *wanted[3:7])
    total = summed([g.to(compute_dtype(g.dtype)) for g in grads]).to(h.dtype) if fast else summed(grads)
    grad, *more = reference_gradients(given.modulated, (h, *given[1:5]), through_norm, (total,))
    if grad is not None and grad_h is not None:
        grad = grad + grad_h
    grad_y = grad_gate = None
    if gate is not None and grad is not None:

        def gated(y: Tensor, gate: Tensor) -> Tensor:
            return gated_residual(torch.zeros_like(h), y, gate, split, fast)

        # Without y the gate's gradient is that of the gate alone.
        y = torch.ones((), dtype=h.dtype, device=h.device).expand(h.shape) if y is None else y
        grad_y, grad_gate = reference_gradients(gated, (y, gate), (by_y, wanted[2]), (grad,))
    grad_bias = token_sum(grad_y) if wanted[7] and grad_y is not None else None
    return [grad if wanted[0] else None, grad_y if wanted[1] else None, grad_gate, *more, grad_bias]


def _backward_sliced(grad_h: Tensor | None, grads: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    h, mean, rstd, y, gate, scale, shift, weight, bias, split, *settings = rest
    part = Slice(h.shape[1], h.shape[2], split)
    # The kernel takes statistics as they were written, without gaps.
    statistics = (t if t is None or t.numel() == 0 else t[:SAMPLES, :: part.step].contiguous() for t in (mean, rstd))
    rows = map(part.parameter, (gate, scale, shift))
    given = part.tokens(grad_h), [part.tokens(g) for g in grads], part.tokens(h), *statistics, part.tokens(y)
    return *given, *rows, weight, bias, part.split, *settings


def _backward_exact(*arguments: Any) -> tuple[bool, ...]:
    """Nothing stands between the output and the gradient of a token's own shift."""
    shift, split = arguments[8], arguments[11]
    return False, False, False, False, parameter_kind(shift, split)[1:] == ("token",), False, False, False


_BACKWARD = Subject(
    "norm_modulate", "backward", _backward_by_triton, _backward_by_reference, _backward_sliced, _backward_exact
)


def backward(grad_h: Tensor | None, grads: Sequence[Tensor], h: Tensor, *rest: Any) -> list[Tensor | None]:
    *given, backend = rest
    _, _, y, gate, *settings, wanted = given
    arguments = grad_h, list(grads), h, *given
    found = None
    if triton := triton_module("norm_modulate", backend, h, y, gate, *settings[:4]):
        trust = settings[7] == "fast"
        if not trust:
            operands = kind(grad_h), len(grads), kind(y), parameter_kind(gate, settings[4]), tuple(wanted)
            signature = _signature(h, settings, *operands)
            trust = trusted(_BACKWARD, triton, signature, h.device, *arguments, backend)
        if trust:
            found = _backward_by_triton(triton, *arguments)
    return _backward_by_reference(*arguments) if found is None else found


def _backward_outputs(h: Tensor, values: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor | None]:
    parameters = values[:5]
    gated = None if parameters[0] is None else h
    likes = (h, gated, *parameters, None if gated is None else h[0, 0])
    return [empty_unless(want, like) for want, like in zip(wanted, likes, strict=True)]


def backward_fake(grad_h: Tensor | None, grads: Sequence[Tensor], *rest: Any) -> list[Tensor | None]:
    return _backward_outputs(rest[0], rest[4:], rest[-2])
