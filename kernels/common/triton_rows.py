"""What the Triton kernels over tokens share: rows of `[B, S, C]` tensors, chunks of tokens, rounding, sums over tokens.

An operand is `(pointer, batch stride, row stride)`, with the channel stride behind them where it is not 1. A stride of
0 repeats a row; a parameter's rows are the tokens, or two segments of them.
"""

import triton
import triton.language as tl

from . import triton_common as common


@triton.jit
def place(channels, block: tl.constexpr, whole: tl.constexpr = True):
    """Of this program: its row, chunk or token of all, its channels, and which of them exist.

    The order of a sum over a row follows from how wide the row's accesses are. Where rows are not `whole` 16-byte runs
    no access may be, so that it is the length of a row that counts, and not where each operand happens to lie.
    """
    blocks = tl.cdiv(channels, block)
    column = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    if not whole:
        column = tl.max_contiguous(column, [1])
    return tl.program_id(0) // blocks, column, column < channels


@triton.jit
def addresses(operand, sample, row, column):
    """Where one row's elements are."""
    start = operand[0] + tl.full((), sample, tl.int64) * operand[1] + tl.full((), row, tl.int64) * operand[2]
    return start + column.to(tl.int64) * operand[3] if len(operand) == 4 else start + column


@triton.jit
def load(operand, sample, row, column, mask, interpreted: tl.constexpr):
    """One row as float32, 0 where masked."""
    return common.widen(tl.load(addresses(operand, sample, row, column), mask=mask, other=0.0), interpreted)


@triton.jit
def store(operand, sample, row, column, mask, value, interpreted: tl.constexpr):
    """Writes one row, rounded to the operand's dtype."""
    stored = common.narrow(value, operand[0].dtype.element_ty, interpreted)
    tl.store(addresses(operand, sample, row, column), stored, mask=mask)


@triton.jit
def rounded(value, dtype: tl.constexpr, interpreted: tl.constexpr):
    """float32 as it comes back from being stored in `dtype`."""
    return common.widen(common.narrow(value, dtype, interpreted), interpreted)


@triton.jit
def parameter_row(token, split, segmented: tl.constexpr):
    """Which row of a parameter counts for a token."""
    row = token
    if segmented:
        row = tl.where(token >= split, 1, 0)
    return row


@triton.jit
def chunk_tokens(part, tokens, split, length):
    """A chunk's first token and the one behind its last; none holds tokens of both segments."""
    before = tl.cdiv(split, length)
    first = tl.where(part < before, part * length, split + (part - before) * length)
    return first, tl.minimum(first + length, tl.where(part < before, split, tokens))


@triton.jit(do_not_specialize=["batch", "chunks", "chunks_before"])
def sum_chunks_kernel(
    partials,
    outputs,
    batch,
    channels,
    chunks,
    chunks_before,
    segmented: tl.constexpr,
    whole_batch: tl.constexpr,
    interpreted: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
):
    """Adds partial sums `[outputs, B, chunks, C]` for `block` channels of one row of one output.

    The last `whole_batch` outputs are sums over the batch too.
    """
    columns = tl.cdiv(channels, block)
    index = tl.program_id(0) // columns
    column = (tl.program_id(0) % columns) * block + tl.arange(0, block)
    lane = tl.arange(0, lanes)
    kept: tl.constexpr = 2 if segmented else 1
    own_rows = (len(outputs) - whole_batch) * batch * kept
    own = index < own_rows
    which = tl.where(own, index // (batch * kept), len(outputs) - whole_batch + index - own_rows)
    sample = tl.where(own, index // kept % batch, 0)
    row = tl.where(own, index % kept, 0)
    first = tl.full((), which, tl.int64) * batch * chunks
    count = batch * chunks
    if own:
        first += tl.full((), sample, tl.int64) * chunks
        count = tl.full((), chunks, tl.int32)
        if segmented:
            first += tl.where(row == 1, chunks_before, 0)
            count = tl.where(row == 1, chunks - chunks_before, chunks_before)
    total = tl.zeros([lanes, block], tl.float32)
    start = partials + first * channels
    for done in tl.range(0, count, lanes):
        place = start + tl.full((), done, tl.int64) * channels
        mask = (done + lane < count)[:, None] & (column < channels)[None, :]
        total += tl.load(place + lane[:, None] * channels + column[None, :], mask=mask, other=0.0)
    value = tl.sum(total, axis=0)
    for i in tl.static_range(len(outputs)):
        if which == i:
            store(outputs[i], sample, row, column, column < channels, value, interpreted)
