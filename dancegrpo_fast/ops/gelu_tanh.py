"""GELU in its tanh form, alone or written behind the attention output that a single-stream block puts before it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_bool
from ..kernels.gelu_tanh import reference
from ._block import Cost, check_device, check_settings, prepare, register_flops, saved, triton_module
from ._checks import check_float
from ._library import checked_once, linked, needs_graph, register


def joint_out(x: Tensor, prefix: Tensor | None) -> Tensor:
    """Room for the prefix and, behind it, numbers like x's."""
    width = x.shape[-1] + (0 if prefix is None else prefix.shape[-1])
    return x.new_empty((*x.shape[:-1], width))


def _forward_impl(x: Tensor, prefix: Tensor | None, mode: str, backend: str) -> Tensor:
    out = joint_out(x, prefix)
    triton = triton_module("gelu_tanh", backend, x)
    # torch's kernel is already one pass, and its bits are eager's.
    if triton and mode == "fast":
        triton.forward(x, prefix, out)
    else:
        reference.gelu_tanh(x, prefix, out)
    return out


def _forward_fake(x: Tensor, prefix: Tensor | None, *unused: Any) -> Tensor:
    return joint_out(x, prefix)


def _backward_impl(grad: Tensor, x: Tensor, mode: str, backend: str) -> Tensor:
    triton = triton_module("gelu_tanh", backend, x)
    if triton and mode == "fast":
        result = joint_out(x, None)
        triton.backward(grad, x, result)
        return result
    return reference.gelu_tanh_gradient(grad, x)


def _backward_fake(grad: Tensor, x: Tensor, *unused: Any) -> Tensor:
    return joint_out(x, None)


forward_op = register(
    "gelu_tanh(Tensor x, Tensor? prefix, str mode, str backend) -> Tensor", _forward_impl, _forward_fake
)
backward_op = register(
    "gelu_tanh_backward(Tensor grad, Tensor x, str mode, str backend) -> Tensor", _backward_impl, _backward_fake
)


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, prefix: Tensor | None, keep_prefix: bool, mode: str, backend: str) -> Tensor:
        ctx.settings = mode, backend
        prepare(ctx)
        ctx.width = 0 if prefix is None else prefix.shape[-1]
        ctx.save_for_backward(x, prefix if keep_prefix else None)
        return forward_op(x, prefix, mode, backend)

    @staticmethod
    def recompute(kept: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return (forward_op(*kept, *settings),)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = saved(ctx)
        grad_x = grad_prefix = None
        if ctx.needs_input_grad[0]:
            grad_x = backward_op(grad[..., ctx.width :], x, *ctx.settings)
        if ctx.needs_input_grad[1]:
            grad_prefix = grad[..., : ctx.width]
        return grad_x, grad_prefix, None, None, None


@checked_once
def check_arguments(x: Tensor, prefix: Tensor | None, mode: str, backend: str, name: str) -> None:
    """What GELU reads, under the name that the caller knows it by, and the prefix that fits."""
    check_float(name, x)
    check_settings(mode, backend)
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want [..., N] with at least one element")
    if prefix is not None:
        check_float("prefix", prefix)
        check_device("prefix", prefix, x, name)
        if prefix.shape[:-1] != x.shape[:-1] or prefix.dtype != x.dtype:
            raise ValueError(
                f"prefix: got {prefix.dtype} of shape {tuple(prefix.shape)}, want {x.dtype} of shape"
                f" {(*x.shape[:-1], '...')} for {name} of {tuple(x.shape)}"
            )


def gelu_tanh(
    x: Tensor, *, prefix: Tensor | None = None, keep_prefix: bool = False, mode: str = "fast", backend: str = "auto"
) -> Tensor:
    """`0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel, arXiv 1606.08415); keeps x.

    Args:
        x: `[..., N]`, float dtypes, any strides.
        prefix: `[..., P]` of x's dtype, copied before the result, so that nothing needs to be concatenated.
        keep_prefix: keep the prefix for the backward too, for `recomputed`; free where attention keeps it anyway.
        mode: "lossless" is torch's own kernel; "fast" is as exact, and writes both parts in one launch.
        backend: "auto" (Triton on a GPU, else plain torch), "triton" or "reference".

    Returns:
        `[..., N]`, or `[..., P + N]`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    check_arguments(x, prefix, mode, backend, "x")
    check_bool("keep_prefix", keep_prefix)
    if not needs_graph(x, prefix):
        return forward_op(x, prefix, mode, backend)
    out: Tensor = linked(_GeluTanh, x, prefix, keep_prefix, mode, backend)
    return out


def cost(rows: int, channels: int, itemsize: int, *, prefix: int = 0) -> Cost:
    """Cost of a call on `rows` rows of `channels` numbers of `itemsize` bytes, behind `prefix` copied numbers."""
    elements = rows * channels
    return Cost(
        9 * elements,
        18 * elements,
        2 * rows * (channels + prefix) * itemsize,
        3 * elements * itemsize,
        elements * itemsize,
    )


def rows_of(x: Tensor) -> tuple[int, int, int]:
    """Rows, channels and itemsize, as `cost` takes them."""
    return x.numel() // x.shape[-1], x.shape[-1], x.element_size()


def _flops(x: Tensor, *unused: Any, **_: Any) -> int:
    return cost(*rows_of(x)).flops_forward


def _flops_backward(grad: Tensor, x: Tensor, *unused: Any, **_: Any) -> int:
    return cost(*rows_of(x)).flops_backward


register_flops("gelu_tanh", _flops)
register_flops("gelu_tanh_backward", _flops_backward)
