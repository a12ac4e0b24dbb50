"""GELU in its tanh form behind a copied prefix, its gradient, and both in one pass."""

import triton
import triton.language as tl

from ..common import triton_rows as rows
from ..common.triton_common import narrow, widen


@triton.jit
def reciprocal(value, ptx: tl.constexpr):
    """1 / value of a normal number, to one unit in the last place."""
    if ptx:
        # Triton's division also scales what is too small or large, which nothing here is.
        found = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, True, 1)
    else:
        found = 1.0 / value
    return found


@triton.jit
def sigmoid_parts(x, ptx: tl.constexpr):
    """sigmoid(2 u) and sigmoid(2 u) (1 - sigmoid(2 u)) for u = sqrt(2 / pi) (x + 0.044715 x^3).

    The exponential, of base 2, is of a number that is never positive: no overflow, and nothing cancels.
    """
    twice = x * tl.fma(x * x, 0.1029432395800235, 2.302208198144325)
    if ptx:
        small = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [-tl.abs(twice)], tl.float32, True, 1)
    else:
        small = tl.exp2(-tl.abs(twice))
    large = reciprocal(1.0 + small, ptx)
    return tl.where(twice >= 0.0, large, small * large), small * large * large


@triton.jit
def gradient(pull, value, sigmoid, slope):
    """Gradient by x, given that of `gelu(x)` and the parts of the sigmoid."""
    inner = tl.fma(value * value, 0.21406444881780076, 1.5957691216057308)
    # In this order a slope of 0 meets no infinity before torch's does.
    return pull * tl.fma(slope * value, inner, sigmoid)


@triton.jit
def where_in_row(part, count, block: tl.constexpr):
    """Columns of a part of a row, and which of them are there."""
    column = part.to(tl.int64) * block + tl.arange(0, block)
    return column, column < count


@triton.jit(do_not_specialize=["parts", "copied"])
def forward_kernel(
    x,
    x_stride,
    x_step,
    count,
    prefix,
    prefix_stride,
    prefix_step,
    prefix_count,
    out,
    out_stride,
    parts,
    copied,
    ptx: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
):
    """A part of a row a program; the first `copied` of a row's `parts` are of the prefix."""
    program = tl.program_id(0)
    row, part = (program // parts).to(tl.int64), program % parts
    target = out + row * out_stride
    if part < copied:
        if prefix is not None:
            place, there = where_in_row(part, prefix_count, block)
            copy = tl.load(prefix + row * prefix_stride + place * prefix_step, mask=there)
            tl.store(target + place, copy, mask=there)
    else:
        column, mask = where_in_row(part - copied, count, block)
        value = widen(tl.load(x + row * x_stride + column * x_step, mask=mask, other=0.0), interpreted)
        sigmoid, _ = sigmoid_parts(value, ptx)
        tl.store(target + prefix_count + column, narrow(value * sigmoid, out.dtype.element_ty, interpreted), mask=mask)


@triton.jit(do_not_specialize=["parts"])
def backward_kernel(
    grad,
    grad_stride,
    grad_step,
    x,
    x_stride,
    x_step,
    count,
    grad_x,
    parts,
    ptx: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
):
    """A part of a row a program; `grad_x` is contiguous."""
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    column, mask = where_in_row(program % parts, count, block)
    value = widen(tl.load(x + row * x_stride + column * x_step, mask=mask, other=0.0), interpreted)
    pull = widen(tl.load(grad + row * grad_stride + column * grad_step, mask=mask, other=0.0), interpreted)
    sigmoid, slope = sigmoid_parts(value, ptx)
    result = gradient(pull, value, sigmoid, slope)
    tl.store(grad_x + row * count + column, narrow(result, grad_x.dtype.element_ty, interpreted), mask=mask)


@triton.jit(do_not_specialize=["tokens", "length", "parts", "copied"])
def gradients_kernel(
    grad,
    x,
    prefix,
    head,
    activation,
    grad_x,
    partials,
    tokens,
    count,
    prefix_count,
    length,
    parts,
    copied,
    ptx: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
):
    """A block of columns of a chunk of rows a program; the first `copied` of a chunk's `parts` copy the prefix.

    Writes `gelu(x)`, the gradient by x and, where asked for, its sum over the chunk.
    """
    program = tl.program_id(0)
    chunk, part = program // parts, program % parts
    first = chunk * length
    end = tl.minimum(first + length, tokens)
    if part < copied:
        if prefix is not None:
            place, there = where_in_row(part, prefix_count, block)
            for token in tl.range(first, end):
                copy = tl.load(rows.addresses(prefix, 0, token, place), mask=there)
                tl.store(rows.addresses(head, 0, token, place), copy, mask=there)
    else:
        column, mask = where_in_row(part - copied, count, block)
        total = tl.zeros([block], tl.float32)
        for token in tl.range(first, end):
            value = rows.load(x, 0, token, column, mask, interpreted)
            pull = rows.load(grad, 0, token, column, mask, interpreted)
            sigmoid, slope = sigmoid_parts(value, ptx)
            rows.store(activation, 0, token, column, mask, value * sigmoid, interpreted)
            by_x = gradient(pull, value, sigmoid, slope)
            rows.store(grad_x, 0, token, column, mask, by_x, interpreted)
            total += by_x
        if partials is not None:
            rows.store(partials, 0, chunk, column, mask, total, interpreted)
