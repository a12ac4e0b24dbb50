"""The gated residual and its gradients, a row's channels in blocks."""

import triton
import triton.language as tl

from ..common import triton_rows as rows


@triton.jit(do_not_specialize=["tokens", "split", "parts", "length"])
def forward_kernel(
    x,
    y,
    gate,
    out,
    tokens,
    channels,
    split,
    parts,
    length,
    segmented: tl.constexpr,
    one_row: tl.constexpr,
    product_type: tl.constexpr,
    fused: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
):
    """`x + gate y` for a block of a few tokens' channels; a gate of `one_row` is read once for all of them."""
    index, column, mask = rows.place(channels, block)
    sample, first = index // parts, index % parts * length
    if one_row:
        gate_row = rows.load(gate, sample, 0, column, mask, interpreted)
    for token in tl.range(first, tl.minimum(first + length, tokens)):
        if not one_row:
            row = rows.parameter_row(token, split, segmented)
            gate_row = rows.load(gate, sample, row, column, mask, interpreted)
        value = rows.load(x, sample, token, column, mask, interpreted)
        added = rows.load(y, sample, token, column, mask, interpreted)
        if fused:
            value = tl.fma(gate_row, added, value)
        else:
            value = value + rows.rounded(gate_row * added, product_type, interpreted)
        rows.store(out, sample, token, column, mask, value, interpreted)


@triton.jit(do_not_specialize=["tokens", "split", "chunks", "length"])
def backward_kernel(
    grad,
    y,
    gate,
    grad_y,
    grad_gate,
    grad_bias,
    tokens,
    channels,
    split,
    chunks,
    length,
    segmented: tl.constexpr,
    sums_gate: tl.constexpr,
    product_type: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
):
    """Gradients of y, of the gate, and of y's bias for a chunk of tokens.

    The bias's is a partial sum, and with `sums_gate` the gate's too.
    """
    index, column, mask = rows.place(channels, block)
    sample, part = index // chunks, index % chunks
    first, end = rows.chunk_tokens(part, tokens, split, length)
    if sums_gate:
        gate_sum = tl.zeros([block], tl.float32)
    if grad_bias is not None:
        bias_sum = tl.zeros([block], tl.float32)
    for token in tl.range(first, end):
        row = rows.parameter_row(token, split, segmented)
        g = rows.rounded(rows.load(grad, sample, token, column, mask, interpreted), product_type, interpreted)
        if (grad_y is not None) or (grad_bias is not None):
            by_y = g * rows.load(gate, sample, row, column, mask, interpreted)
            by_y = rows.rounded(by_y, product_type, interpreted)
            if grad_y is not None:
                rows.store(grad_y, sample, token, column, mask, by_y, interpreted)
            if grad_bias is not None:
                bias_sum += by_y
        if grad_gate is not None:
            by_gate = g * rows.load(y, sample, token, column, mask, interpreted)
            by_gate = rows.rounded(by_gate, product_type, interpreted)
            if sums_gate:
                gate_sum += by_gate
            else:
                rows.store(grad_gate, sample, token, column, mask, by_gate, interpreted)
    if sums_gate:
        rows.store(grad_gate, sample, part, column, mask, gate_sum, interpreted)
    if grad_bias is not None:
        rows.store(grad_bias, sample, part, column, mask, bias_sum, interpreted)
