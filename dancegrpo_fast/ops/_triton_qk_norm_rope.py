"""Queries and keys by Triton: one launch a stream, and one each for the gradients of its weights and biases."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.qk_norm_rope import triton_kernels as kernels
from ..kernels.qk_norm_rope import triton_sums
from ._launch import launch_on, planned
from ._qk_norm_rope import GRADIENTS

# Elements of a tile: 8 a thread are one 16-byte access of 16-bit numbers, or two of 8 bytes where halves are paired.
TILE, THREAD = 1024, 8
WARPS = 4
# Registers a thread, for six and four programs of 128 threads a multiprocessor; addresses of single elements take more.
FORWARD_REGISTERS, BACKWARD_REGISTERS, UNALIGNED_REGISTERS = 80, 128, 255
# A sample's backward has so many programs at most: twice the places of 132 multiprocessors, as in an H100 or H200. One
# more would run alone.
CHUNKS = 2 * 4 * 132
# Partial sums are added by tiles of so many rows and columns.
SUM_ROWS, SUM_COLUMNS = 128, 16


def _tile(heads: int, dim: int) -> dict[str, int]:
    """Heads and columns of a tile, and the warps for it."""
    block = max(16, 1 << (dim - 1).bit_length())
    rows = min(1 << (heads - 1).bit_length(), max(1, TILE // block))
    return {"rows": rows, "block": block, "num_warps": max(1, min(WARPS, rows * block // (32 * THREAD)))}


def _is_aligned(tensors: list[Tensor], dim: int, half_split: bool) -> bool:
    """Whether each head's halves, and the heads themselves, are whole runs of 8 elements."""
    if dim % (16 if half_split else 8):
        return False
    return all(
        t.stride(-1) == 1
        and all(stride % 8 == 0 for size, stride in zip(t.shape[:-1], t.stride(), strict=False) if size > 1)
        for t in tensors
    )


def _in_runs(x: Tensor, half_split: bool) -> Tensor:
    """A copy of what does not lie in such runs: the order of a head's sum then follows from its size alone.

    Else a head that lies otherwise in the replay than in the rollout could be summed in another order.
    """
    if not _is_aligned([x], x.shape[-1], half_split):
        return x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _table(table: Tensor | None) -> tuple[Any, ...] | None:
    return None if table is None else (table, *table.stride())


def _vector(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def _shared(stream: Any, norm: str, rope: str, mode: str, tensors: list[Tensor], registers: int) -> dict[str, Any]:
    heads, dim = stream.query.shape[2:]
    half_split = rope == "half" and stream.cos is not None
    aligned = _is_aligned(tensors, dim, half_split)
    registers = registers if aligned else UNALIGNED_REGISTERS
    return {
        "norm": norm,
        "lossless": mode == "lossless",
        "per_pair": stream.cos is not None and stream.cos.shape[1] != dim,
        "half_split": half_split,
        "aligned": aligned,
        **_tile(heads, dim),
        **({} if torch.version.hip is not None else {"maxnreg": registers}),
    }


def _width(norm: str, heads: int, dim: int) -> float:
    """Numbers that a mean square is over."""
    return float(heads * dim if norm == "token" else dim)


def _stepwise(stream: Any, norm: str, rope_gradient: str) -> bool:
    """Whether real products with a table in half precision are rounded one by one, as torch's promotion has it."""
    weight = stream.q_weight
    dtype = weight.dtype if norm == "head_twice" and weight is not None else stream.query.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    return half and rope_gradient == "each" and stream.cos is not None and stream.cos.dtype == dtype


def forward(
    streams: Any, norm: str, eps: float, rope: str, rope_gradient: str, mode: str, outputs: tuple[Tensor, ...]
) -> None:
    """Writes joint queries, joint keys and the norm's statistics."""
    query, key, *rstds = outputs
    if len(streams) == 1:
        _forward_stream(streams[0], norm, eps, rope, rope_gradient, mode, (query, key, rstds[0]))
        return
    parts = [stream.query.shape[1] for stream in streams]
    queries = query.split_with_sizes(parts, 1)
    keys = (key, key) if streams[0].key is None else key.split_with_sizes(parts, 1)
    for stream, out, out_key, rstd in zip(streams, queries, keys, rstds, strict=True):
        _forward_stream(stream, norm, eps, rope, rope_gradient, mode, (out, out_key, rstd))


@planned
def _forward_stream(
    stream: Any,
    norm: str,
    eps: float,
    rope: str,
    rope_gradient: str,
    mode: str,
    outputs: tuple[Tensor, Tensor | None, Tensor],
) -> None:
    batch, tokens, heads, dim = stream.query.shape
    half_split = rope == "half" and stream.cos is not None
    operands: list[Any] = [None, None]
    tensors: list[Tensor] = []
    *outs, rstd = outputs
    given = (stream.query, stream.q_weight, outs[0]), (stream.key, stream.k_weight, outs[1])
    for i, (x, weight, out) in enumerate(given):
        if x is not None and out is not None:
            x = _in_runs(x, half_split)
            operands[i] = (x, *x.stride(), _given(_vector(weight)), out, *out.stride()[:2])
            tensors += [x, out]
    arguments = (
        *(*operands, rstd, _table(stream.cos), _table(stream.sin), tokens, batch * tokens, heads, dim),
        *(_width(norm, heads, dim), eps, 0 if stream.cos is None else len(stream.cos)),
        1 if norm == "token" else heads,
    )
    settings = _shared(stream, norm, rope, mode, tensors, FORWARD_REGISTERS)
    settings["stepwise"] = mode == "lossless" and _stepwise(stream, norm, rope_gradient)
    launch_on(stream.query.device, kernels.forward_kernel, batch * tokens, arguments, settings)


@planned
def _backward_stream(
    stream: Any,
    grads: tuple[Tensor | None, Tensor | None],
    rstd: Tensor,
    norm: str,
    rope: str,
    rope_gradient: str,
    mode: str,
    outputs: list[Tensor | None],
) -> None:
    batch, tokens, heads, dim = stream.query.shape
    by_tile = any(t is not None for t in outputs[4:])
    tiles = -(-heads // _tile(heads, dim)["rows"]) if by_tile else 1
    # By the number of tokens alone: a sample's sums do not depend on its batch.
    chunk = -(-tokens // max(1, CHUNKS // tiles))
    chunks = -(-tokens // chunk)
    programs = batch * chunks * tiles
    width = heads * dim if norm == "token" else dim
    half_split = rope == "half" and stream.cos is not None
    operands: list[Any] = [None, None]
    weight_sums: list[Any] = [None, None]
    bias_sums: list[Any] = [None, None]
    tensors = []
    for i, (x, weight, grad) in enumerate(
        ((stream.query, stream.q_weight, grads[0]), (stream.key, stream.k_weight, grads[1]))
    ):
        wanted = outputs[i], outputs[i + 2], outputs[i + 4]
        if grad is None:
            for output in wanted:
                if output is not None:
                    output.zero_()
        elif any(t is not None for t in wanted):
            partial = [
                None if output is None else torch.empty(rows, size, dtype=torch.float32, device=x.device)
                for output, rows, size in zip(wanted[1:], (programs, batch * chunks), (width, heads * dim), strict=True)
            ]
            for sums, room, output in zip((weight_sums, bias_sums), partial, wanted[1:], strict=True):
                sums[i] = None if room is None else (room, output)
            x, grad = _in_runs(x, half_split), _in_runs(grad, half_split)
            given = (x, *x.stride(), _given(_vector(weight)), grad, *grad.stride())
            operands[i] = (*given, _given(wanted[0]), heads * dim, i, *map(_given, partial))
            tensors += [t for t in (x, grad, wanted[0]) if t is not None]
    if not tensors:
        return
    arguments = (
        *(*operands, rstd, _table(stream.cos), _table(stream.sin), tokens, batch * tokens, heads, dim),
        *(_width(norm, heads, dim), 0 if stream.cos is None else len(stream.cos), 1 if norm == "token" else heads),
        *(chunk, chunks),
    )
    settings = {
        **_shared(stream, norm, rope, mode, tensors, BACKWARD_REGISTERS),
        "each": rope_gradient == "each",
        "by_tile": by_tile,
    }
    device = stream.query.device
    launch_on(device, kernels.backward_kernel, programs, arguments, settings)
    for sums, count, size in ((weight_sums, programs, width), (bias_sums, batch * chunks, heads * dim)):
        if any(sums):
            blocks = -(-size // SUM_COLUMNS)
            launch_on(
                device,
                triton_sums.sum_kernel,
                2 * blocks,
                (*sums, count, size, blocks),
                {"rows": SUM_ROWS, "columns": SUM_COLUMNS, "num_warps": WARPS},
            )


def backward(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    rstds: tuple[Tensor, Tensor],
    streams: Any,
    norm: str,
    eps: float,
    rope: str,
    rope_gradient: str,
    mode: str,
    outputs: list[Tensor | None],
) -> None:
    """Writes the wanted gradients: per stream by query, key, both weights, and both biases but for "token"."""
    start = 0
    for number, stream in enumerate(streams):
        stop = start + stream.query.shape[1]
        grads = tuple(None if g is None else g[:, start:stop] for g in (grad_query, grad_key))
        found = outputs[GRADIENTS * number : GRADIENTS * (number + 1)]
        _backward_stream(stream, (grads[0], grads[1]), rstds[number], norm, rope, rope_gradient, mode, found)
        start = stop
