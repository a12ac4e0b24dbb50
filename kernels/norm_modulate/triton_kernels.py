"""Norm and modulation of tokens after an optional gated residual; a program has a few tokens, backward a chunk.

A `..._type` is what a value is rounded to on its way, float32 where it is not; the modes differ in nothing else.
"""

import triton
import triton.language as tl

from ..common import triton_rows as rows


@triton.jit
def affine(value, weight, bias, column, mask, layer: tl.constexpr, norm_type: tl.constexpr, interpreted: tl.constexpr):
    """The norm's result from normalised values, rounded to its type."""
    if weight is not None:
        value = value * rows.rounded(rows.load(weight, 0, 0, column, mask, interpreted), norm_type, interpreted)
    if bias is not None:
        if not layer:
            # Torch's RMSNorm has no bias: there it is an operation of its own.
            value = rows.rounded(value, norm_type, interpreted)
        value = value + rows.rounded(rows.load(bias, 0, 0, column, mask, interpreted), norm_type, interpreted)
    return rows.rounded(value, norm_type, interpreted)


@triton.jit
def one_plus(scale, sample, row, column, mask, scale_type: tl.constexpr, interpreted: tl.constexpr):
    """`1 + scale`."""
    return rows.rounded(1.0 + rows.load(scale, sample, row, column, mask, interpreted), scale_type, interpreted)


@triton.jit(do_not_specialize=["tokens", "split", "parts", "length", "eps"])
def forward_kernel(
    x,
    y,
    gate,
    scale,
    shift,
    weight,
    bias,
    h,
    out,
    mean,
    rstd,
    tokens,
    channels,
    split,
    parts,
    length,
    eps,
    segmented: tl.constexpr,
    gated_type: tl.constexpr,
    norm_type: tl.constexpr,
    scale_type: tl.constexpr,
    product_type: tl.constexpr,
    sum_type: tl.constexpr,
    fused: tl.constexpr,
    pieces: tl.constexpr,
    single: tl.constexpr,
    whole: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
):
    """A few tokens: gated residual, norm, modulation; with `mean` a LayerNorm, without it an RMSNorm.

    A row is `pieces` blocks; where it is `fused`, products are added without rounding. `single`: one token a program.
    """
    program = tl.program_id(0)
    sample, first = program // parts, program % parts * length
    column = tl.arange(0, block)
    if not whole:
        # As in `place`.
        column = tl.max_contiguous(column, [1])
    count = tl.full((), channels, tl.int32).to(tl.float32)
    end = first + 1 if single else tl.minimum(first + length, tokens)
    for token in tl.range(first, end, num_stages=1):
        row = rows.parameter_row(token, split, segmented)
        values = ()
        for i in tl.static_range(pieces):
            here, mask = column + i * block, column + i * block < channels
            value = rows.load(x, sample, token, here, mask, interpreted)
            if y is not None:
                added = rows.load(gate, sample, row, here, mask, interpreted)
                added = added * rows.load(y, sample, token, here, mask, interpreted)
                value = value + rows.rounded(added, gated_type, interpreted)
                value = rows.rounded(value, h[0].dtype.element_ty, interpreted)
            values += (value,)
        if y is not None:
            for i in tl.static_range(pieces):
                here, mask = column + i * block, column + i * block < channels
                rows.store(h, sample, token, here, mask, values[i], interpreted)
        centred = ()
        total = rows.rounded(values[0], norm_type, interpreted)
        for i in tl.static_range(1, pieces):
            total += rows.rounded(values[i], norm_type, interpreted)
        place = tl.full((), sample, tl.int64) * tokens + token
        if mean is not None:
            centre = tl.div_rn(tl.sum(total, axis=0), count)
            tl.store(mean + place, centre)
        for i in tl.static_range(pieces):
            value = rows.rounded(values[i], norm_type, interpreted)
            if mean is not None:
                value = tl.where(column + i * block < channels, value - centre, 0.0)
            centred += (value,)
        squares = centred[0] * centred[0]
        for i in tl.static_range(1, pieces):
            squares = tl.fma(centred[i], centred[i], squares)
        deviation = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), count) + eps)
        reciprocal = tl.div_rn(tl.full((), 1.0, tl.float32), deviation)
        tl.store(rstd + place, reciprocal)
        for i in tl.static_range(pieces):
            here, mask = column + i * block, column + i * block < channels
            value = centred[i] * reciprocal
            value = affine(value, weight, bias, here, mask, mean is not None, norm_type, interpreted)
            if fused:
                factor = one_plus(scale, sample, row, here, mask, scale_type, interpreted)
                value = tl.fma(value, factor, rows.load(shift, sample, row, here, mask, interpreted))
            else:
                if scale is not None:
                    value = value * one_plus(scale, sample, row, here, mask, scale_type, interpreted)
                    value = rows.rounded(value, product_type, interpreted)
                if shift is not None:
                    value = value + rows.load(shift, sample, row, here, mask, interpreted)
                    value = rows.rounded(value, sum_type, interpreted)
            rows.store(out, sample, token, here, mask, value, interpreted)


@triton.jit
def add_pairs(a0, a1, b0, b1):
    """Sum of two pairs."""
    return a0 + b0, a1 + b1


@triton.jit
def two_sums(a, b, interpreted: tl.constexpr):
    """Two sums over a row in one exchange between warps."""
    # The interpreter combines element by element, in Python.
    return (tl.sum(a, axis=0), tl.sum(b, axis=0)) if interpreted else tl.reduce((a, b), 0, add_pairs)


@triton.jit(do_not_specialize=["tokens", "split", "chunks", "length"])
def backward_kernel(
    grad_h,
    grads,
    h,
    mean,
    rstd,
    y,
    gate,
    scale,
    weight,
    bias,
    dx,
    dy,
    dgate,
    dscale,
    dshift,
    dweight,
    dbias,
    dybias,
    tokens,
    channels,
    split,
    chunks,
    length,
    segmented: tl.constexpr,
    sums_gate: tl.constexpr,
    sums_scale: tl.constexpr,
    sums_shift: tl.constexpr,
    gated_type: tl.constexpr,
    norm_type: tl.constexpr,
    scale_type: tl.constexpr,
    product_type: tl.constexpr,
    sum_type: tl.constexpr,
    grad_type: tl.constexpr,
    stages: tl.constexpr,
    whole: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
):
    """Gradients of a chunk of tokens; with `sums_...` parameters' are partial sums, those of a `[C]` vector always.

    The gate's is that of `gate y`, and without y that of the gate alone, the sum of dx.
    """
    index, column, mask = rows.place(channels, block, whole)
    sample, part = index // chunks, index % chunks
    first, end = rows.chunk_tokens(part, tokens, split, length)
    share = tl.div_rn(tl.full((), 1.0, tl.float32), tl.full((), channels, tl.int32).to(tl.float32))
    layer: tl.constexpr = mean is not None
    if sums_gate:
        gate_sum = tl.zeros([block], tl.float32)
    if sums_scale:
        scale_sum = tl.zeros([block], tl.float32)
    if sums_shift:
        shift_sum = tl.zeros([block], tl.float32)
    if dweight is not None:
        weight_sum = tl.zeros([block], tl.float32)
    if dbias is not None:
        bias_sum = tl.zeros([block], tl.float32)
    if dybias is not None:
        y_sum = tl.zeros([block], tl.float32)
    for token in tl.range(first, end, num_stages=stages):
        row = rows.parameter_row(token, split, segmented)
        g = rows.load(grads[len(grads) - 1], sample, token, column, mask, interpreted)
        for i in tl.static_range(len(grads) - 2, -1, -1):
            g = rows.rounded(g + rows.load(grads[i], sample, token, column, mask, interpreted), grad_type, interpreted)
        g = rows.rounded(g, sum_type, interpreted)
        if dshift is not None:
            if sums_shift:
                shift_sum += g
            else:
                rows.store(dshift, sample, token, column, mask, g, interpreted)
        g = rows.rounded(g, product_type, interpreted)
        place = tl.full((), sample, tl.int64) * tokens + token
        reciprocal = tl.load(rstd + place)
        value = rows.rounded(rows.load(h, sample, token, column, mask, interpreted), norm_type, interpreted)
        if layer:
            value = value - tl.load(mean + place)
        value = value * reciprocal
        if scale is not None:
            if dscale is not None:
                by_scale = g * affine(value, weight, bias, column, mask, layer, norm_type, interpreted)
                by_scale = rows.rounded(by_scale, product_type, interpreted)
                if sums_scale:
                    scale_sum += by_scale
                else:
                    rows.store(dscale, sample, token, column, mask, by_scale, interpreted)
            g = g * one_plus(scale, sample, row, column, mask, scale_type, interpreted)
            g = rows.rounded(g, product_type, interpreted)
        g = rows.rounded(g, norm_type, interpreted)
        if dbias is not None:
            bias_sum += g
        if dweight is not None:
            weight_sum += g * value
        if ((dx is not None) or (dy is not None)) or ((dgate is not None) or (dybias is not None)):
            if weight is not None:
                g = g * rows.rounded(rows.load(weight, 0, 0, column, mask, interpreted), norm_type, interpreted)
            if layer:
                along, across = two_sums(g * value, g, interpreted)
                g = g - across * share
            else:
                along = tl.sum(g * value, axis=0)
            g = (g - value * (along * share)) * reciprocal
            g = rows.rounded(rows.rounded(g, norm_type, interpreted), grad_type, interpreted)
            if grad_h is not None:
                g = rows.rounded(
                    g + rows.load(grad_h, sample, token, column, mask, interpreted), grad_type, interpreted
                )
            if dx is not None:
                rows.store(dx, sample, token, column, mask, g, interpreted)
            g = rows.rounded(g, gated_type, interpreted)
            if (dy is not None) or (dybias is not None):
                by_y = g * rows.load(gate, sample, row, column, mask, interpreted)
                by_y = rows.rounded(by_y, gated_type, interpreted)
                if dy is not None:
                    rows.store(dy, sample, token, column, mask, by_y, interpreted)
                if dybias is not None:
                    y_sum += by_y
            if dgate is not None:
                by_gate = g
                if y is not None:
                    by_gate = rows.rounded(
                        g * rows.load(y, sample, token, column, mask, interpreted), gated_type, interpreted
                    )
                if sums_gate:
                    gate_sum += by_gate
                else:
                    rows.store(dgate, sample, token, column, mask, by_gate, interpreted)
    if sums_gate:
        rows.store(dgate, sample, part, column, mask, gate_sum, interpreted)
    if sums_scale:
        rows.store(dscale, sample, part, column, mask, scale_sum, interpreted)
    if sums_shift:
        rows.store(dshift, sample, part, column, mask, shift_sum, interpreted)
    if dweight is not None:
        rows.store(dweight, sample, part, column, mask, weight_sum, interpreted)
    if dbias is not None:
        rows.store(dbias, sample, part, column, mask, bias_sum, interpreted)
    if dybias is not None:
        rows.store(dybias, sample, part, column, mask, y_sum, interpreted)
