"""RMSNorm and rotary embedding of queries and keys, written into the joint buffers of both streams."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_choice, shown
from ._block import (
    Cost,
    check_device,
    check_eps,
    check_operand,
    check_settings,
    prepare,
    register_flops,
    saved,
    unpacked,
)
from ._checks import check_float
from ._library import checked_once, linked, needs_graph, register
from ._qk_norm_rope import GRADIENTS, STREAM, backward, backward_fake, forward, forward_fake, streams_of
from ._qk_norm_rope import Stream as Stream

NORMS = ("none", "head", "head_twice", "token")
ROPES = ("interleaved", "half")
ROPE_GRADIENTS = ("each", "once")

_STREAM = "Tensor{0} query{1}, Tensor? key{1}, Tensor? q_weight{1}, Tensor? k_weight{1}, Tensor? cos{1}, Tensor? sin{1}"
_SETTINGS = "str norm, float eps, str rope, str rope_gradient, str mode"
_STREAMS = f"{_STREAM.format('', '')}, {_STREAM.format('?', '2')}"


_forward_op = register(
    f"qk_norm_rope({_STREAMS}, {_SETTINGS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)", forward, forward_fake
)
_backward_op = register(
    f"qk_norm_rope_backward(Tensor? grad_query, Tensor? grad_key, Tensor rstd, Tensor rstd2, {_STREAMS}, {_SETTINGS},"
    f" bool[] wanted, str backend) -> ({', '.join(['Tensor'] * 2 * GRADIENTS)})",
    backward,
    backward_fake,
)


# Of both streams.
_BIASES = 4
_NO_STREAM = (None,) * (STREAM + 2)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        # Biases count for nothing but their gradients.
        arguments = given[_BIASES:]
        ctx.set_materialize_grads(False)
        query, key, rstd, rstd2 = _forward_op(*arguments)
        ctx.settings = arguments[2 * STREAM :]
        prepare(ctx)
        biases, needed = ctx.needs_input_grad[:_BIASES], ctx.needs_input_grad[_BIASES:]
        ctx.wanted = [*needed[:4], *biases[:2], *needed[STREAM : STREAM + 4], *biases[2:]]
        if key.numel() == 0:
            ctx.mark_non_differentiable(key)
        tensors = list(arguments[: 2 * STREAM])
        ctx.recomputable = ctx.settings[0] != "none"
        if not ctx.recomputable:
            # A rotation's gradient needs shapes alone.
            for i in (0, 1, STREAM, STREAM + 1):
                tensors[i] = None if tensors[i] is None else tensors[i].new_empty(1).expand(tensors[i].shape)
        ctx.save_for_backward(rstd, rstd2, *tensors)
        return query, key

    @staticmethod
    def recompute(kept: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Tensor, ...]:
        _, _, *streams = kept
        query, key, _, _ = _forward_op(*streams, *settings)
        return query, key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor | None, grad_key: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * len(ctx.settings)
        if grad_query is None and grad_key is None:
            return *(None,) * (_BIASES + 2 * STREAM), *rest
        rstd, rstd2, *streams = saved(ctx)
        *settings, backend = ctx.settings
        found = _backward_op(grad_query, grad_key, rstd, rstd2, *streams, *settings, ctx.wanted, backend)
        grads = unpacked(found, ctx.wanted)
        first, second = grads[:GRADIENTS], grads[GRADIENTS:]
        return *first[4:], *second[4:], *first[:4], None, None, *second[:4], None, None, *rest


def _check_stream(name: str, stream: Stream, first: Stream, norm: str) -> None:
    like = first.query
    for part in ("query", "key"):
        value = getattr(stream, part)
        if value is None and part == "key":
            if first.key is not None:
                raise ValueError(f"{name}.key: got None, want a tensor as in the first stream")
            continue
        label = f"{name}.{part}"
        check_float(label, value)
        check_device(label, value, like, "stream.query")
        if value.ndim != 4 or value.numel() == 0:
            raise ValueError(f"{label}: got shape {tuple(value.shape)}, want [B, S, H, D] with at least one element")
        wanted = (like.shape[0], stream.query.shape[1], *like.shape[2:])
        if value.shape != wanted or value.dtype != like.dtype:
            raise ValueError(f"{label}: got {value.dtype} of shape {tuple(value.shape)}, want {like.dtype} of {wanted}")
    if first.key is None and stream.key is not None:
        raise ValueError(f"{name}.key: got a tensor, want None as in the first stream")
    heads, dim = like.shape[2:]
    width = heads * dim if norm == "token" else dim
    for part in ("q_weight", "k_weight"):
        value = getattr(stream, part)
        if value is None:
            continue
        check_float(f"{name}.{part}", value)
        check_device(f"{name}.{part}", value, like, "stream.query")
        if norm == "none" or value.shape != (width,):
            wanted_text = "None without a norm" if norm == "none" else f"({width},)"
            raise ValueError(f"{name}.{part}: got shape {tuple(value.shape)}, want {wanted_text}")
    for part, of in (("q_bias", stream.query), ("k_bias", stream.key)):
        value = getattr(stream, part)
        if of is None and value is not None:
            raise ValueError(f"{name}.{part}: got a tensor, want None without a key")
        given = f"heads of {tuple(like.shape[2:])}"
        check_operand(f"{name}.{part}", value, (heads * dim,), like.dtype, ("stream.query", like), given)
    if (stream.cos is None) != (stream.sin is None):
        missing = "cos" if stream.cos is None else "sin"
        raise ValueError(f"{name}.{missing}: got None, want both cos and sin or neither")
    for part in ("cos", "sin"):
        value = getattr(stream, part)
        if value is None:
            continue
        check_float(f"{name}.{part}", value)
        check_device(f"{name}.{part}", value, like, "stream.query")
        if dim % 2:
            raise ValueError(f"{name}.{part}: got a table for heads of {dim} numbers, want an even number")
        rows = stream.query.shape[1]
        assert stream.cos is not None
        if value.ndim != 2 or value.shape[1] not in (dim, dim // 2) or not 1 <= len(value) <= rows:
            wanted_text = f"[R, {dim}] or [R, {dim // 2}] with R of 1 to {rows}"
            raise ValueError(f"{name}.{part}: got shape {tuple(value.shape)}, want {wanted_text}")
        if value.shape != stream.cos.shape:
            raise ValueError(f"{name}.sin: got shape {tuple(value.shape)}, want that of cos, {tuple(stream.cos.shape)}")


@checked_once
def _checked(*arguments: Any) -> float:
    """`eps` of the op's arguments."""
    biases, both, settings = arguments[:_BIASES], arguments[_BIASES:-6], arguments[-6:]
    norm, eps, rope, rope_gradient, mode, backend = settings
    first, second = Stream(*both[:STREAM], *biases[:2]), Stream(*both[STREAM:], *biases[2:])
    check_settings(mode, backend)
    eps = check_eps(eps)
    check_choice("norm", norm, NORMS)
    check_choice("rope", rope, ROPES)
    check_choice("rope_gradient", rope_gradient, ROPE_GRADIENTS)
    _check_stream("stream", first, first, norm)
    if second.query is not None:
        _check_stream("second", second, first, norm)
    return eps


def qk_norm_rope(
    stream: Stream,
    second: Stream | None = None,
    *,
    norm: str = "head",
    eps: float = 1e-6,
    rope: str = "interleaved",
    rope_gradient: str = "each",
    mode: str = "fast",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """RMSNorm (arXiv 1910.07467) and RoPE (arXiv 2104.09864) of queries and keys into `[B, S, H, D]` joint buffers.

    Keeps queries and keys before the norm, and one number for each head (or token).

    Args:
        stream, second: the streams in their order in the joint sequence.
        norm: "none"; "head", over D; "head_twice", over D, rounded before the weight too in "lossless" mode, as
            diffusers' RMSNorm is; "token", over H D.
        eps: added to the mean square.
        rope: "interleaved", pairs `(2 i, 2 i + 1)`, or "half", pairs `(i, i + D / 2)`.
        rope_gradient: in "lossless" mode, whether each term of the rotation's gradient is rounded ("each", real
            products) or only their sum ("once", a complex product).
        mode: "fast" computes in float32 and rounds once; "lossless" rounds wherever eager torch does.
        backend: "auto" (Triton on a GPU, else plain torch), "triton" or "reference".

    Returns:
        `(query, key)`, `[B, S1 + S2, H, D]`; no key where none was given.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    for name, value in (("stream", stream), ("second", second)):
        if not isinstance(value, Stream) and not (name == "second" and value is None):
            raise ValueError(f"{name}: got {shown(value)}, want a Stream")
        if value is not None and value.query is None:
            check_float(f"{name}.query", value.query)
    both = (*stream[:STREAM], *(second or _NO_STREAM)[:STREAM])
    biases = (*stream[STREAM:], *(second or _NO_STREAM)[STREAM:])
    eps = _checked(*biases, *both, norm, eps, rope, rope_gradient, mode, backend)
    if needs_graph(*biases, *both):
        query, key = linked(_QkNormRope, *biases, *both, norm, eps, rope, rope_gradient, mode, backend)
    else:
        query, key, _, _ = _forward_op(*both, norm, eps, rope, rope_gradient, mode, backend)
    return query, None if stream.key is None else key


def cost(
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    itemsize: int,
    *,
    norm: bool = True,
    rope: bool = True,
    biases: bool = False,
) -> Cost:
    """Cost for queries and keys of all streams together; weights, biases and rotary tables are left out.

    `biases`: whether they get their gradients here.
    """
    elements = 2 * batch * tokens * heads * dim
    statistics = 2 * batch * tokens * heads * 4 if norm else 0
    return Cost(
        elements * ((4 if norm else 0) + (3 if rope else 0)),
        elements * ((8 if norm else 0) + (3 if rope else 0) + (1 if biases else 0)),
        2 * elements * itemsize + statistics,
        (3 if norm else 2) * elements * itemsize + statistics,
        elements * itemsize + statistics if norm else 0,
    )


def _cost_of(arguments: Sequence[Any], wanted: Sequence[bool] = ()) -> Cost:
    streams = streams_of(arguments)
    batch, _, heads, dim = streams[0].query.shape
    tokens = sum(s.query.shape[1] for s in streams)
    whole = cost(
        batch,
        tokens,
        heads,
        dim,
        streams[0].query.element_size(),
        norm=arguments[2 * STREAM] != "none",
        rope=any(s.cos is not None for s in streams),
        biases=any(wanted[i] for start in range(4, len(wanted), GRADIENTS) for i in (start, start + 1)),
    )
    return whole if streams[0].key is not None else Cost(*(n // 2 for n in whole))


register_flops("qk_norm_rope", lambda *arguments, **_: _cost_of(arguments).flops_forward)
register_flops("qk_norm_rope_backward", lambda *arguments, **_: _cost_of(arguments[4:], arguments[-2]).flops_backward)
