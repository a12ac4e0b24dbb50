"""Partial sums of programs added up to gradients."""

import triton
import triton.language as tl

from ..common.triton_common import narrow


@triton.jit
def add_up(partial, out, program, count, width, rows: tl.constexpr, columns: tl.constexpr, interpreted: tl.constexpr):
    """Adds partial sums `[count, width]` in a fixed order, for a program's columns."""
    column = program * columns + tl.arange(0, columns)[None, :]
    lane = tl.arange(0, rows)[:, None]
    total = tl.zeros([rows, columns], tl.float32)
    for above in range(0, count, rows):
        where = (above + lane).to(tl.int64) * width + column
        total += tl.load(partial + where, mask=(above + lane < count) & (column < width), other=0.0)
    value = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out + column, narrow(value, out.dtype.element_ty, interpreted), mask=column < width)


@triton.jit(do_not_specialize=["count", "width", "blocks"])
def sum_kernel(query, key, count, width, blocks, rows: tl.constexpr, columns: tl.constexpr, interpreted: tl.constexpr):
    """Sums that are gradients; `query` and `key` are `(partial sums, out)`, the first `blocks` programs query's."""
    program = tl.program_id(0)
    if program < blocks:
        if query is not None:
            add_up(query[0], query[1], program, count, width, rows, columns, interpreted)
    elif key is not None:
        add_up(key[0], key[1], program - blocks, count, width, rows, columns, interpreted)
