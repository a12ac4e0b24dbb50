"""The two implementations of `qk_norm_rope` and its gradients, and which of them a call gets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.common.modulation import compute_dtype, token_sum
from ..kernels.qk_norm_rope import reference
from ._block import empty_unless, reference_gradients, triton_module
from .selfcheck import SAMPLES, Slice, Subject, kind, trusted

# Of one stream: query, key, query weight, key weight, cos, sin.
STREAM = 6
# Of one stream: by query, key, query weight, key weight, query bias, key bias.
GRADIENTS = 6


class Stream(NamedTuple):
    """Queries and keys of one stream of tokens, and what is done to them.

    query, key: `[B, S, H, D]`, any strides; no key where only queries (or only keys, passed as `query`) are processed.
    q_weight, k_weight: of the norm, `[D]`, or `[H D]` for "token".
    cos, sin: float32 `[R, D]`, or `[R, D / 2]` with one number a pair, of the first R tokens; None for no rotation.
    q_bias, k_bias: `[H D]` of the queries' dtype, biases of the layers that made query and key, where these were
        computed with them detached: their gradients, the sums of query's and key's, come from here. Their values are
        not read.
    """

    query: Tensor
    key: Tensor | None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None


def streams_of(arguments: Sequence[Any]) -> list[Stream]:
    """One stream or two, from an op's first arguments."""
    first, second = Stream(*arguments[:STREAM]), arguments[STREAM : 2 * STREAM]
    return [first] if second[0] is None else [first, Stream(*second)]


def _tensors(streams: list[Stream]) -> list[Tensor]:
    return [t for stream in streams for t in stream if t is not None]


def _rstd(stream: Stream | None, norm: str, like: Tensor) -> Tensor:
    """Room for the reciprocal root mean squares: `[1 or 2, B, S, H]`, one head for "token"."""
    dtype = compute_dtype(like.dtype)
    if stream is None or norm == "none":
        return like.new_empty(0, dtype=dtype)
    batch, tokens, heads, _ = stream.query.shape
    return like.new_empty(1 if stream.key is None else 2, batch, tokens, 1 if norm == "token" else heads, dtype=dtype)


def _forward_outputs(streams: list[Stream], norm: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query = streams[0].query
    batch, _, heads, dim = query.shape
    joint = query.new_empty(batch, sum(s.query.shape[1] for s in streams), heads, dim)
    key = query.new_empty(0) if streams[0].key is None else torch.empty_like(joint)
    second = streams[1] if len(streams) > 1 else None
    return joint, key, _rstd(streams[0], norm, query), _rstd(second, norm, query)


def _by_triton(triton: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    streams = streams_of(arguments)
    outputs = _forward_outputs(streams, arguments[2 * STREAM])
    triton.forward(streams, *arguments[2 * STREAM :], outputs)
    return outputs


def _by_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    streams, (norm, eps, rope, rope_gradient, mode) = streams_of(arguments), arguments[2 * STREAM :]
    outputs = _forward_outputs(streams, norm)
    settings = norm, eps, rope == "half", rope_gradient == "once", mode == "fast"
    start = 0
    for stream, rstd in zip(streams, outputs[2:], strict=False):
        stop = start + stream.query.shape[1]
        pairs = ((stream.query, stream.q_weight), (stream.key, stream.k_weight))
        for i, (x, weight) in enumerate(pairs):
            if x is not None:
                outputs[i][:, start:stop] = reference.norm_rope(x, weight, stream.cos, stream.sin, *settings)
                if norm != "none":
                    rstd[i] = reference.reciprocal_rms(x, norm, eps)
        start = stop
    return outputs


def _slices(streams: list[Stream]) -> list[Slice]:
    return [Slice(s.query.shape[1], s.query.shape[2] * s.query.shape[3]) for s in streams]


def _sliced(*arguments: Any) -> tuple[Any, ...]:
    streams, parts = streams_of(arguments), []
    for stream, part in zip(streams, _slices(streams), strict=True):
        query, key, q_weight, k_weight, *tables = stream[:STREAM]
        rows = (None if t is None else t[:: part.step] for t in tables)
        parts += [part.tokens(query), part.tokens(key), q_weight, k_weight, *rows]
    return *parts, *arguments[len(parts) :]


def _signature(streams: list[Stream], norm: str, rope: str, rope_gradient: str, *more: Any) -> tuple[Any, ...]:
    query = streams[0].query
    operands = (
        (kind(s.key), kind(s.q_weight), kind(s.k_weight), kind(s.cos), s.cos is not None and s.cos.shape[1])
        for s in streams
    )
    return query.dtype, *query.shape[2:], norm, rope, rope_gradient, *operands, *more


_FORWARD = Subject(
    "qk_norm_rope",
    "forward",
    _by_triton,
    _by_reference,
    _sliced,
    lambda *arguments: (arguments[2 * STREAM] == "none",) * 2,
)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, backend = arguments
    streams, (norm, _, rope, rope_gradient, mode) = streams_of(given), given[2 * STREAM :]
    if triton := triton_module("qk_norm_rope", backend, *_tensors(streams)):
        trust = mode == "fast" or trusted(
            _FORWARD, triton, _signature(streams, norm, rope, rope_gradient), given[0].device, *arguments
        )
        if trust:
            return _by_triton(triton, *given)
    return _by_reference(*given)


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(streams_of(arguments), arguments[2 * STREAM])


def _backward_outputs(streams: list[Stream], wanted: Sequence[bool]) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(wanted)
    for start, stream in zip(range(0, len(wanted), GRADIENTS), streams, strict=False):
        for i, like in enumerate(stream[:4]):
            found[start + i] = empty_unless(wanted[start + i], like)
        for i in (start + 4, start + 5):
            found[i] = stream.query.new_empty(stream.query.shape[2:].numel()) if wanted[i] else None
    return found


def _through(wanted: Sequence[bool]) -> list[bool]:
    """Without the biases, but with the queries and keys whose sums their gradients are."""
    found: list[bool] = []
    for start in range(0, len(wanted), GRADIENTS):
        query, key, *weights, query_bias, key_bias = wanted[start : start + GRADIENTS]
        found += [query or query_bias, key or key_bias, *weights, False, False]
    return found


def _with_sums(found: list[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """What is wanted of the gradients of `_through`; those of biases are torch's own sums."""
    for i in (start + i for start in range(0, len(wanted), GRADIENTS) for i in (0, 1)):
        grad = found[i]
        if wanted[i + 4] and grad is not None:
            found[i + 4] = token_sum(grad.flatten(2))
        found[i] = grad if wanted[i] else None
    return found


def _backward_by_triton(triton: Any, *arguments: Any) -> list[Tensor | None]:
    grad_query, grad_key, rstd, rstd2, *rest = arguments
    streams, (*settings, wanted) = streams_of(rest), rest[2 * STREAM :]
    # A program of "token" would add to memory for each token; "lossless" keeps torch's sum, whose bits are eager's.
    apart = settings[0] == "token" or settings[4] == "lossless"
    outputs = _backward_outputs(streams, _through(wanted) if apart else wanted)
    triton.backward(grad_query, grad_key, (rstd, rstd2), streams, *settings, outputs)
    return _with_sums(outputs, wanted) if apart else outputs


def _backward_by_reference(
    grad_query: Tensor | None, grad_key: Tensor | None, rstd: Tensor, rstd2: Tensor, *arguments: Any
) -> list[Tensor | None]:
    streams, (norm, eps, rope, rope_gradient, mode, wanted) = streams_of(arguments), arguments[2 * STREAM :]
    settings = norm, eps, rope == "half", rope_gradient == "once", mode == "fast"
    through = _through(wanted)
    found: list[Tensor | None] = []
    start = 0
    for number, stream in enumerate(streams):
        stop = start + stream.query.shape[1]
        each: list[list[Tensor | None]] = []
        for i, (x, weight, grad) in enumerate(
            ((stream.query, stream.q_weight, grad_query), (stream.key, stream.k_weight, grad_key))
        ):
            keep = through[GRADIENTS * number + i], through[GRADIENTS * number + i + 2]

            def turned(
                x: Tensor, weight: Tensor | None, cos: Tensor | None = stream.cos, sin: Any = stream.sin
            ) -> Tensor:
                return reference.norm_rope(x, weight, cos, sin, *settings)

            if x is None:
                each.append([None, None])
            else:
                part = None if grad is None else grad[:, start:stop]
                each.append(reference_gradients(turned, (x, weight), keep, (part,)))
        found += [each[0][0], each[1][0], each[0][1], each[1][1], None, None]
        start = stop
    return _with_sums(found + [None] * (len(wanted) - len(found)), wanted)


def _backward_sliced(*arguments: Any) -> tuple[Any, ...]:
    *grads, rstd, rstd2 = arguments[:4]
    streams = streams_of(arguments[4:])
    slices, lengths = _slices(streams), [stream.query.shape[1] for stream in streams]
    joint: list[Tensor | None] = []
    for grad in grads:
        parts = [] if grad is None else grad.split_with_sizes(lengths, dim=1)
        found = [t[:SAMPLES, :: part.step] for t, part in zip(parts, slices, strict=False)]
        joint.append(torch.cat(found, dim=1) if found else None)
    statistics = [rstd, rstd2]
    for i, part in enumerate(slices):
        # The kernel takes them as they were written, without gaps.
        if statistics[i].numel():
            statistics[i] = statistics[i][:, :SAMPLES, :: part.step].contiguous()
    return *joint, *statistics, *_sliced(*arguments[4:])


_BACKWARD = Subject(
    "qk_norm_rope",
    "backward",
    _backward_by_triton,
    _backward_by_reference,
    _backward_sliced,
    lambda *arguments: (arguments[4 + 2 * STREAM] == "none",) * 2 * GRADIENTS,
)


def backward(*arguments: Any) -> list[Tensor | None]:
    *given, backend = arguments
    streams, (norm, _, rope, rope_gradient, mode, wanted) = streams_of(given[4:]), given[4 + 2 * STREAM :]
    query, found = streams[0].query, None
    if triton := triton_module("qk_norm_rope", backend, *_tensors(streams)):
        trust = mode == "fast"
        if not trust:
            signature = _signature(streams, norm, rope, rope_gradient, kind(given[0]), kind(given[1]), tuple(wanted))
            trust = trusted(_BACKWARD, triton, signature, query.device, *arguments)
        if trust:
            found = _backward_by_triton(triton, *given)
    return _backward_by_reference(*given) if found is None else found


def backward_fake(grad_query: Any, grad_key: Any, rstd: Tensor, rstd2: Tensor, *arguments: Any) -> list[Tensor | None]:
    return _backward_outputs(streams_of(arguments), arguments[-2])
