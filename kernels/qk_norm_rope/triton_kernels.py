"""RMSNorm and rotary embedding of one stream's queries and keys, forward and backward.

What may be missing from an operand is a tuple of one or none: up to Triton 3.6 no tuple can hold None.
"""

import triton
import triton.language as tl

from .triton_heads import (
    base,
    held,
    leave,
    load_pair,
    load_row,
    load_turn,
    store_pair,
    token_rstd,
    turned_back,
)


@triton.jit
def norm_rope(
    operand,
    sample,
    token,
    statistics,
    turn,
    heads,
    dim,
    width,
    eps,
    norm: tl.constexpr,
    lossless: tl.constexpr,
    stepwise: tl.constexpr,
    half_split: tl.constexpr,
    aligned: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Writes one token's queries or keys, and what the norm divided by."""
    weight = operand[5]
    weighted: tl.constexpr = len(weight) != 0
    twice: tl.constexpr = norm == "head_twice"
    dtype: tl.constexpr = weight[0].dtype.element_ty if (twice and weighted) else operand[0].dtype.element_ty
    start = base(operand[0], sample, token, operand[1], operand[2], aligned)
    out = base(operand[6], sample, token, operand[7], operand[8], aligned)
    lane = tl.arange(0, rows)[:, None]
    if norm == "token":
        rstd = token_rstd(operand, start, heads, dim, width, eps, half_split, aligned, rows, block, interpreted)
        tl.store(statistics, rstd)
    elif weighted:
        weight_first, weight_second = load_row(weight[0], True, 1, dim, False, half_split, block, interpreted)
    for above in range(0, heads, rows):
        head = above + lane
        mask = head < heads
        row = head.to(tl.int64) * operand[3]
        first, second = load_pair(start, row, mask, operand[4], dim, half_split, aligned, rows, block, interpreted)
        if norm != "none":
            if norm != "token":
                squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
                rstd = tl.rsqrt(tl.div_rn(squares, width) + eps)
                tl.store(statistics + head, rstd, mask=mask)
            first, second = first * rstd, second * rstd
            if weighted:
                if twice:
                    first = held(first, dtype, lossless, interpreted)
                    second = held(second, dtype, lossless, interpreted)
                if norm == "token":
                    weight_first, weight_second = load_pair(
                        weight[0], head.to(tl.int64) * dim, mask, 1, dim, half_split, aligned, rows, block, interpreted
                    )
                first, second = first * weight_first, second * weight_second
            first, second = held(first, dtype, lossless, interpreted), held(second, dtype, lossless, interpreted)
        if len(turn) != 0:
            again: tl.constexpr = lossless and dtype != operand[0].dtype.element_ty
            turned_first = held(first * turn[1], dtype, stepwise, interpreted)
            turned_first -= held(second * turn[3], dtype, stepwise, interpreted)
            turned_second = held(second * turn[2], dtype, stepwise, interpreted)
            turned_second += held(first * turn[4], dtype, stepwise, interpreted)
            turned_first = held(turned_first, dtype, again, interpreted)
            turned_second = held(turned_second, dtype, again, interpreted)
            first = tl.where(turn[0], turned_first, first)
            second = tl.where(turn[0], turned_second, second)
        row = head.to(tl.int64) * dim
        store_pair(out, row, mask, dim, first, second, half_split, aligned, rows, block, interpreted)


@triton.jit(do_not_specialize=["tokens", "count", "heads", "turned", "statistic_heads"])
def forward_kernel(
    query,
    key,
    rstd,
    cos,
    sin,
    tokens,
    count,
    heads,
    dim,
    width,
    eps,
    turned,
    statistic_heads,
    norm: tl.constexpr,
    lossless: tl.constexpr,
    stepwise: tl.constexpr,
    per_pair: tl.constexpr,
    half_split: tl.constexpr,
    aligned: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """One token a program; `query` and `key` are `(x, its four strides, weight, out, its batch and token stride)`."""
    program = tl.program_id(0)
    sample, token = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    turn = load_turn(cos, sin, token, turned, dim, per_pair, half_split, block, interpreted)
    for index in tl.static_range(2):
        operand = query if index == 0 else key
        if operand is not None:
            statistics = rstd + (count.to(tl.int64) * index + program) * statistic_heads
            norm_rope(
                operand,
                sample,
                token,
                statistics,
                turn,
                heads,
                dim,
                width,
                eps,
                norm,
                lossless,
                stepwise,
                half_split,
                aligned,
                rows,
                block,
                interpreted,
            )


@triton.jit
def differentiate(
    operand,
    sample,
    token,
    fresh,
    partial,
    position,
    count,
    statistic_heads,
    rstds,
    turn,
    sums,
    first_head,
    heads,
    dim,
    width,
    norm: tl.constexpr,
    by_tile: tl.constexpr,
    lossless: tl.constexpr,
    each: tl.constexpr,
    half_split: tl.constexpr,
    aligned: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """Writes the gradient by one token's queries or keys, and adds to its sums and the gradient by the weights.

    Of all heads from the first one on, or with `by_tile` of one tile.
    """
    sum_first, sum_second, bias_first, bias_second = sums
    weight = operand[5]
    weighted: tl.constexpr = len(weight) != 0
    # What is rounded before the weight and added up in the storage type, as autograd does.
    twice: tl.constexpr = lossless and norm == "head_twice"
    x_type: tl.constexpr = operand[0].dtype.element_ty
    dtype: tl.constexpr = weight[0].dtype.element_ty if (norm == "head_twice" and weighted) else x_type
    per_token: tl.constexpr = norm == "token"
    start = base(operand[0], sample, token, operand[1], operand[2], aligned)
    grad = base(operand[6], sample, token, operand[7], operand[8], aligned)
    statistics = rstds + (count.to(tl.int64) * operand[13] + position) * statistic_heads
    lane = tl.arange(0, rows)[:, None]
    if weighted and not per_token:
        weight_first, weight_second = load_row(weight[0], True, 1, dim, False, half_split, block, interpreted)
    if per_token:
        rstd = tl.load(statistics)
        total = tl.zeros([rows, block // 2], tl.float32)
        if len(operand[11]) != 0:
            for above in range(0, heads, rows):
                head = above + lane
                mask = head < heads
                wide = head.to(tl.int64)
                first, second = turned_back(
                    grad,
                    wide * operand[9],
                    mask,
                    operand[10],
                    turn,
                    dim,
                    dtype,
                    lossless,
                    each,
                    half_split,
                    aligned,
                    rows,
                    block,
                    interpreted,
                )
                if weighted:
                    weight_first, weight_second = load_pair(
                        weight[0], head.to(tl.int64) * dim, mask, 1, dim, half_split, aligned, rows, block, interpreted
                    )
                    first, second = first * weight_first, second * weight_second
                x_first, x_second = load_pair(
                    start, wide * operand[3], mask, operand[4], dim, half_split, aligned, rows, block, interpreted
                )
                total += first * (x_first * rstd) + second * (x_second * rstd)
        projection = tl.div_rn(tl.sum(total), width)
    for above in range(first_head, first_head + 1 if by_tile else heads, rows):
        head = above + lane
        mask = head < heads
        wide = head.to(tl.int64)
        first, second = turned_back(
            grad,
            wide * operand[9],
            mask,
            operand[10],
            turn,
            dim,
            dtype,
            lossless,
            each,
            half_split,
            aligned,
            rows,
            block,
            interpreted,
        )
        if norm != "none":
            x_first, x_second = load_pair(
                start, wide * operand[3], mask, operand[4], dim, half_split, aligned, rows, block, interpreted
            )
            if not per_token:
                rstd = tl.load(statistics + head, mask=mask, other=0.0)
            scaled_first, scaled_second = x_first * rstd, x_second * rstd
            if len(partial) != 0:
                used_first = held(scaled_first, dtype, twice, interpreted)
                used_second = held(scaled_second, dtype, twice, interpreted)
                add_first = held(first * used_first, dtype, twice, interpreted)
                add_second = held(second * used_second, dtype, twice, interpreted)
                if per_token:
                    # The program's own row, still in the nearest cache; the first token finds nothing there.
                    old_first, old_second = load_pair(
                        partial[0], wide * dim, mask & (fresh == 0), 1, dim, half_split, False, rows, block, interpreted
                    )
                    store_pair(
                        partial[0],
                        wide * dim,
                        mask,
                        dim,
                        old_first + add_first,
                        old_second + add_second,
                        half_split,
                        False,
                        rows,
                        block,
                        interpreted,
                    )
                else:
                    sum_first += add_first
                    sum_second += add_second
            if weighted:
                if per_token:
                    weight_first, weight_second = load_pair(
                        weight[0], head.to(tl.int64) * dim, mask, 1, dim, half_split, aligned, rows, block, interpreted
                    )
                first = held(first * weight_first, dtype, twice, interpreted)
                second = held(second * weight_second, dtype, twice, interpreted)
            if twice:
                dot = tl.sum(first * x_first + second * x_second, axis=1, keep_dims=True)
                pull = tl.div_rn((dot * -0.5) * (rstd * rstd * rstd), width)
                first = held(first * rstd, x_type, True, interpreted)
                second = held(second * rstd, x_type, True, interpreted)
                first += held(pull * (x_first * 2.0), x_type, True, interpreted)
                second += held(pull * (x_second * 2.0), x_type, True, interpreted)
            else:
                if not per_token:
                    dot = tl.sum(first * scaled_first + second * scaled_second, axis=1, keep_dims=True)
                    projection = tl.div_rn(dot, width)
                first = rstd * (first - scaled_first * projection)
                second = rstd * (second - scaled_second * projection)
        if len(operand[11]) != 0:
            out = base(operand[11][0], position, 0, operand[12], 0, aligned)
            store_pair(out, wide * dim, mask, dim, first, second, half_split, aligned, rows, block, interpreted)
        if len(operand[15]) != 0:
            bias_first += first
            bias_second += second
    return sum_first, sum_second, bias_first, bias_second


@triton.jit(do_not_specialize=["tokens", "count", "heads", "turned", "statistic_heads", "chunk", "chunks"])
def backward_kernel(
    query,
    key,
    rstds,
    cos,
    sin,
    tokens,
    count,
    heads,
    dim,
    width,
    turned,
    statistic_heads,
    chunk,
    chunks,
    norm: tl.constexpr,
    by_tile: tl.constexpr,
    lossless: tl.constexpr,
    each: tl.constexpr,
    per_pair: tl.constexpr,
    half_split: tl.constexpr,
    aligned: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """A chunk of tokens a program: all heads, or with `by_tile` one tile, which sums over x's gradient need.

    `query` and `key` are `(x, its four strides, weight, gradient of the output, its four strides, gradient by x, its
    token stride, place among the statistics, partial sums of the weight's gradient, and of x's)`.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(heads, rows) if by_tile else 1
    index_of_chunk, first_head = program // tiles, program % tiles * rows
    sample, part = (index_of_chunk // chunks).to(tl.int64), index_of_chunk % chunks
    zeros = tl.zeros([rows, block // 2], tl.float32)
    query_sums = (zeros, zeros, zeros, zeros)
    key_sums = (zeros, zeros, zeros, zeros)
    begin = part * chunk
    for place in range(begin, tl.minimum(begin + chunk, tokens)):
        token = tl.full((), place, tl.int64)
        position = sample * tokens + token
        turn = load_turn(cos, sin, token, turned, dim, per_pair, half_split, block, interpreted)
        for index in tl.static_range(2):
            operand = query if index == 0 else key
            if operand is not None:
                partial = operand[14]
                if len(partial) != 0 and norm == "token":
                    partial = (partial[0] + tl.cast(program, tl.int64) * heads * dim,)
                found = differentiate(
                    operand,
                    sample,
                    token,
                    (place == begin).to(tl.int32),
                    partial,
                    position,
                    count,
                    statistic_heads,
                    rstds,
                    turn,
                    query_sums if index == 0 else key_sums,
                    first_head,
                    heads,
                    dim,
                    width,
                    norm,
                    by_tile,
                    lossless,
                    each,
                    half_split,
                    aligned,
                    rows,
                    block,
                    interpreted,
                )
                if index == 0:
                    query_sums = found
                else:
                    key_sums = found
        if norm == "token":
            # What one thread left in the partial sums, another may add to.
            tl.debug_barrier()
    if norm != "token":
        for index in tl.static_range(2):
            operand = query if index == 0 else key
            if operand is not None:
                sums = query_sums if index == 0 else key_sums
                leave(operand[14], program, dim, sums[0], sums[1], half_split, block, interpreted)
                if len(operand[15]) != 0:
                    start = operand[15][0] + index_of_chunk.to(tl.int64) * heads * dim
                    head = first_head + tl.arange(0, rows)[:, None]
                    row = head.to(tl.int64) * dim
                    there = head < heads
                    store_pair(start, row, there, dim, sums[2], sums[3], half_split, False, rows, block, interpreted)
