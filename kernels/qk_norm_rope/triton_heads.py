"""Tiles of heads: where they lie, how they are read, written, summed and turned.

A tile is held as two halves, `[rows, block / 2]` each: the even and the odd numbers of every head, or its first and
second half where pairs are `(i, i + D / 2)`. So a pair of the rotation is one number of each.
`aligned` says that 8 elements from any multiple of 8 on lie on their own 8 in memory.
"""

import triton
import triton.language as tl

from ..common.triton_common import narrow, widen
from ..common.triton_rows import rounded


@triton.jit
def held(value, dtype: tl.constexpr, lossless: tl.constexpr, interpreted: tl.constexpr):
    """A value as `dtype` would hold it, in lossless mode."""
    if lossless:
        value = rounded(value, dtype, interpreted)
    return value


@triton.jit
def base(pointer, sample, token, sample_stride, token_stride, aligned: tl.constexpr):
    """Where a token starts."""
    offset = sample * sample_stride + token * token_stride
    if aligned:
        offset = tl.multiple_of(offset, 8)
    return pointer + offset


@triton.jit
def places(row, mask, stride, dim, half_split: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr):
    """Offsets of a tile (with `half_split` of its first halves), and which of them are there."""
    width: tl.constexpr = block // 2 if half_split else block
    column = tl.arange(0, width)[None, :]
    count = dim // 2 if half_split else dim
    keep = mask & (column < count)
    offset = row + column.to(tl.int64) * stride
    if aligned:
        # Hints hold for what is computed here; those on an argument are lost when the call is inlined.
        offset = tl.multiple_of(offset, [1, 8])
        keep = tl.max_constancy(keep, [1, 8])
    return offset, keep


@triton.jit
def second_half(dim, stride, aligned: tl.constexpr):
    """From a head's first half to its second."""
    offset = (dim // 2).to(tl.int64) * stride
    if aligned:
        offset = tl.multiple_of(offset, 8)
    return offset


@triton.jit
def load_pair(
    start,
    row,
    mask,
    stride,
    dim,
    half_split: tl.constexpr,
    aligned: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Both halves of a tile as float32, 0 where masked; `row` and `mask` are `[rows, 1]`."""
    offset, keep = places(row, mask, stride, dim, half_split, aligned, block)
    value = widen(tl.load(start + offset, mask=keep, other=0.0), interpreted)
    if half_split:
        first = value
        where = start + second_half(dim, stride, aligned) + offset
        second = widen(tl.load(where, mask=keep, other=0.0), interpreted)
    else:
        first, second = tl.split(tl.reshape(value, [rows, block // 2, 2]))
    return first, second


@triton.jit
def store_pair(
    start,
    row,
    mask,
    dim,
    first,
    second,
    half_split: tl.constexpr,
    aligned: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Writes both halves of a tile of contiguous heads, rounded."""
    dtype: tl.constexpr = start.dtype.element_ty
    offset, keep = places(row, mask, 1, dim, half_split, aligned, block)
    if half_split:
        tl.store(start + offset, narrow(first, dtype, interpreted), mask=keep)
        where = start + second_half(dim, 1, aligned) + offset
        tl.store(where, narrow(second, dtype, interpreted), mask=keep)
    else:
        value = tl.reshape(tl.join(first, second), [rows, block])
        tl.store(start + offset, narrow(value, dtype, interpreted), mask=keep)


@triton.jit
def load_row(
    start,
    there,
    stride,
    dim,
    per_pair: tl.constexpr,
    half_split: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Both halves, `[1, block / 2]`, of one row of weights, cosines or sines; with `per_pair` they are the same."""
    column = tl.arange(0, block // 2)[None, :]
    mask = (column < (dim + 1) // 2) & there
    step = stride if (per_pair or half_split) else 2 * stride
    where = start + column.to(tl.int64) * step
    first = widen(tl.load(where, mask=mask, other=0.0), interpreted)
    if per_pair:
        second = first
    else:
        # The last column of an odd number has no partner; half a head is never odd.
        mask = (column < dim // 2) & there
        gap = (dim // 2).to(tl.int64) * stride if half_split else stride
        second = widen(tl.load(where + gap, mask=mask, other=0.0), interpreted)
    return first, second


@triton.jit
def load_turn(
    cos,
    sin,
    token,
    turned,
    dim,
    per_pair: tl.constexpr,
    half_split: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """A token's rotation: whether there is one, cosines and sines of both halves; nothing without a table."""
    if cos is not None:
        there = token < turned
        start = cos[0] + token * cos[1]
        cos_first, cos_second = load_row(start, there, cos[2], dim, per_pair, half_split, block, interpreted)
        start = sin[0] + token * sin[1]
        sin_first, sin_second = load_row(start, there, sin[2], dim, per_pair, half_split, block, interpreted)
        turn = (there, cos_first, cos_second, sin_first, sin_second)
    else:
        turn = ()
    return turn


@triton.jit
def token_rstd(
    operand,
    start,
    heads,
    dim,
    width,
    eps,
    half_split: tl.constexpr,
    aligned: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Reciprocal root mean square over all heads."""
    total = tl.zeros([rows, block // 2], tl.float32)
    for above in range(0, heads, rows):
        head = above + tl.arange(0, rows)[:, None]
        row = head.to(tl.int64) * operand[3]
        first, second = load_pair(
            start, row, head < heads, operand[4], dim, half_split, aligned, rows, block, interpreted
        )
        total += first * first + second * second
    return tl.rsqrt(tl.div_rn(tl.sum(total), width) + eps)


@triton.jit
def turned_back(
    start,
    row,
    mask,
    stride,
    turn,
    dim,
    dtype: tl.constexpr,
    lossless: tl.constexpr,
    each: tl.constexpr,
    half_split: tl.constexpr,
    aligned: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """The gradient by the norm's output, of `dtype`: the output's gradient turned by the opposite angle."""
    first, second = load_pair(start, row, mask, stride, dim, half_split, aligned, rows, block, interpreted)
    if len(turn) != 0:
        again: tl.constexpr = lossless and dtype != start.dtype.element_ty
        first, second = held(first, dtype, again, interpreted), held(second, dtype, again, interpreted)
        rounds: tl.constexpr = lossless and each
        turned_first = held(first * turn[1], dtype, rounds, interpreted)
        turned_first += held(second * turn[4], dtype, rounds, interpreted)
        turned_second = held(second * turn[2], dtype, rounds, interpreted)
        turned_second -= held(first * turn[3], dtype, rounds, interpreted)
        first = tl.where(turn[0], turned_first, first)
        second = tl.where(turn[0], turned_second, second)
    return held(first, dtype, lossless, interpreted), held(second, dtype, lossless, interpreted)


@triton.jit
def leave(
    partial, program, dim, first, second, half_split: tl.constexpr, block: tl.constexpr, interpreted: tl.constexpr
):
    """Stores a program's sums over its tokens and heads, where they are wanted."""
    if len(partial) != 0:
        first, second = tl.sum(first, axis=0, keep_dims=True), tl.sum(second, axis=0, keep_dims=True)
        row = tl.zeros([1, 1], tl.int64)
        start = partial[0] + program.to(tl.int64) * dim
        store_pair(start, row, row == 0, dim, first, second, half_split, False, 1, block, interpreted)
