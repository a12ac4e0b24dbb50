"""Sampling, scoring and the gradient of one denoising step: one program a block, one launch a call.

The arithmetic is call.h's, operation by operation. Compile with fused multiply-add off.
"""

import triton
import triton.language as tl

from ..common import triton_common as common


@triton.jit
def guided(cond, uncond, sample, first, lane, mask, sizes, guidance, interpreted: tl.constexpr):
    """The model output after guidance."""
    velocity = common.load(cond, sample, first, lane, mask, sizes, interpreted)
    if uncond is not None:
        other = common.load(uncond, sample, first, lane, mask, sizes, interpreted)
        velocity = other + guidance * (velocity - other)
    return velocity


@triton.jit
def product(factor, velocity, dtype: tl.constexpr, interpreted: tl.constexpr):
    """`factor v` as the published code holds it."""
    return common.widen(common.narrow(factor * velocity, dtype, interpreted), interpreted)


@triton.jit
def mean_of(row, known, x, velocity, dtype: tl.constexpr, rounded: tl.constexpr, interpreted: tl.constexpr):
    """Mean of the step; with reference rounding from products rounded to `dtype`, float32 once guidance was applied."""
    mean = common.column(row, known, 0) * x
    if rounded:
        drift = product(common.column(row, known, 7), velocity, dtype, interpreted)
        clean = product(common.column(row, known, 4), velocity, dtype, interpreted)
        mean = mean + common.column(row, known, 8) * drift + common.column(row, known, 9) * clean
    else:
        mean = mean + common.column(row, known, 1) * velocity
    return mean


@triton.jit
def denoised_of(row, known, x, velocity, dtype: tl.constexpr, rounded: tl.constexpr, interpreted: tl.constexpr):
    """The estimate of x0."""
    p, q = common.column(row, known, 3), common.column(row, known, 4)
    clean = q * velocity
    if rounded:
        clean = product(q, velocity, dtype, interpreted)
    return p * x + clean


@triton.jit
def draw(tau, key0, key1, sample_ids, sample, index, first, block: tl.constexpr):
    """The kernel's own noise; none is drawn where tau is 0."""
    eps = tl.zeros([block], tl.float32)
    if tau != 0.0:
        name = sample
        if sample_ids is not None:
            name = tl.load(sample_ids + sample)
        eps = common.normals(key0, key1, name, index, first, block)
    return eps


@triton.jit
def log_prob_of(row, known, square_high, square_low, numel):
    """`scale mean(d^2) + constant` from the sum of squares, rounded once; a row without noise scores its constant."""
    scale, constant = common.column(row, known, 5), common.column(row, known, 6)
    numel_high, numel_low = common.whole(numel)
    high, low = common.divide(square_high, square_low, numel_high, numel_low)
    high, low = common.multiply(scale, 0.0, high, low)
    high, low = common.add(high, low, constant, 0.0)
    return tl.where(scale == 0.0, constant, high + low)


@triton.jit
def write_log_prob(row, known, value, sample, part, blocks, numel, partials, tickets, log_prob, lanes: tl.constexpr):
    """Adds a block's differences; the sample's last block writes its log-probability."""
    high, low = common.sum_squares(value)
    mine = partials + sample * blocks * 2
    tl.store(mine + part.to(tl.int64) * 2, high)
    tl.store(mine + part.to(tl.int64) * 2 + 1, low)
    if common.take_ticket(tickets, sample, blocks):
        highs, lows, _ = common.total(mine, blocks, 1, lanes)
        score = log_prob_of(row, known, common.pick(highs, 0, 1), common.pick(lows, 0, 1), numel)
        tl.store(log_prob + sample, score)


@triton.jit(do_not_specialize=["table_rows", "step_index", "key0", "key1", "blocks"])
def sample_kernel(
    latents,
    output,
    uncond,
    next_latents,
    noise,
    denoised,
    sizes,
    table,
    table_rows,
    step,
    step_index,
    guidance,
    sample_ids,
    key0,
    key1,
    numel,
    blocks,
    partials,
    tickets,
    log_prob,
    seeded: tl.constexpr,
    rounded: tl.constexpr,
    wide: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
    lanes: tl.constexpr,
):
    """Next latents rounded as stored, their log-probability and, where asked for, the estimate of x0."""
    sample, part, first = common.place(blocks, block, wide)
    row, index, known = common.row_of(table, table_rows, step, step_index, sample)
    lane = tl.arange(0, block)
    mask = lane < numel - first
    dtype: tl.constexpr = output[0].dtype.element_ty if uncond is None else tl.float32
    tau = common.column(row, known, 2)
    # Drawn before anything is loaded: fewer numbers live at once.
    if seeded:
        eps = draw(tau, key0, key1, sample_ids, sample, index, first, block)
    if noise is not None:
        noisy = common.where_used(lane, numel - first, tau != 0.0)
        eps = common.load(noise, sample, first, lane, noisy, sizes, interpreted)
    x = common.load(latents, sample, first, lane, mask, sizes, interpreted)
    velocity = guided(output, uncond, sample, first, lane, mask, sizes, guidance, interpreted)
    mean = mean_of(row, known, x, velocity, dtype, rounded, interpreted)
    value = mean
    if seeded or noise is not None:
        value = tl.where(tau != 0.0, mean + tau * eps, mean)
    stored = common.narrow(value, next_latents[0].dtype.element_ty, interpreted)
    tl.store(common.addresses(next_latents, sample, first, lane, sizes), stored, mask=mask)
    if denoised is not None:
        clean = denoised_of(row, known, x, velocity, dtype, rounded, interpreted)
        common.store(denoised, sample, first, lane, mask, sizes, clean, interpreted)
    difference = tl.where(mask, common.widen(stored, interpreted) - mean, 0.0)
    write_log_prob(row, known, difference, sample, part, blocks, numel, partials, tickets, log_prob, lanes)


@triton.jit(do_not_specialize=["table_rows", "step_index", "blocks"])
def log_prob_kernel(
    latents,
    output,
    uncond,
    next_latents,
    sizes,
    table,
    table_rows,
    step,
    step_index,
    guidance,
    numel,
    blocks,
    partials,
    tickets,
    log_prob,
    rounded: tl.constexpr,
    wide: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
    lanes: tl.constexpr,
):
    """The log-probability of given next latents."""
    sample, part, first = common.place(blocks, block, wide)
    row, _, known = common.row_of(table, table_rows, step, step_index, sample)
    lane = tl.arange(0, block)
    mask = lane < numel - first
    dtype: tl.constexpr = output[0].dtype.element_ty if uncond is None else tl.float32
    x = common.load(latents, sample, first, lane, mask, sizes, interpreted)
    velocity = guided(output, uncond, sample, first, lane, mask, sizes, guidance, interpreted)
    mean = mean_of(row, known, x, velocity, dtype, rounded, interpreted)
    stored = common.load(next_latents, sample, first, lane, mask, sizes, interpreted)
    difference = tl.where(mask, stored - mean, 0.0)
    write_log_prob(row, known, difference, sample, part, blocks, numel, partials, tickets, log_prob, lanes)


@triton.jit
def slope_of(row, known, numel):
    """d log_prob / d v over `x' - mean`, as a pair."""
    high, low = common.multiply(-2.0 * common.column(row, known, 5), 0.0, common.column(row, known, 1), 0.0)
    numel_high, numel_low = common.whole(numel)
    return common.divide(high, low, numel_high, numel_low)


@triton.jit(do_not_specialize=["table_rows", "step_index", "blocks"])
def gradient_kernel(
    latents,
    output,
    uncond,
    next_latents,
    pull,
    mean_output,
    grad_output,
    grad_uncond,
    sizes,
    table,
    table_rows,
    step,
    step_index,
    guidance,
    grad_log_prob,
    grad_loss,
    step_scale,
    pull_scale,
    numel,
    blocks,
    rounded: tl.constexpr,
    wide: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
):
    """`step_scale (x' - mean) + pull_scale (v - pull)` through guidance; what is scaled by 0 is not read."""
    sample, _, first = common.place(blocks, block, wide)
    row, _, known = common.row_of(table, table_rows, step, step_index, sample)
    lane = tl.arange(0, block)
    left = numel - first
    mask = lane < left
    dtype: tl.constexpr = output[0].dtype.element_ty if uncond is None else tl.float32
    if grad_log_prob is not None:
        high, low = slope_of(row, known, numel)
        high, low = common.multiply(high, low, tl.load(grad_log_prob + sample), 0.0)
        by_step = high + low
    else:
        by_step = tl.load(step_scale + sample) * tl.load(grad_loss)
    steps = by_step != 0.0
    stepped = common.where_used(lane, left, steps)
    used = stepped
    if pull is not None:
        by_pull = tl.load(pull_scale + sample) * tl.load(grad_loss)
        pulls = by_pull != 0.0
        used = common.where_used(lane, left, steps | pulls)
    velocity = guided(output, uncond, sample, first, lane, used, sizes, guidance, interpreted)
    x = common.load(latents, sample, first, lane, stepped, sizes, interpreted)
    stored = common.load(next_latents, sample, first, lane, stepped, sizes, interpreted)
    through = velocity
    if mean_output is not None:
        through = common.load(mean_output, sample, first, lane, stepped, sizes, interpreted)
    mean = mean_of(row, known, x, through, dtype, rounded, interpreted)
    grad = tl.where(steps, by_step * (stored - mean), 0.0)
    if pull is not None:
        target = common.load(pull, sample, first, lane, common.where_used(lane, left, pulls), sizes, interpreted)
        grad += tl.where(pulls, by_pull * (velocity - target), 0.0)
    if uncond is None:
        common.store(grad_output, sample, first, lane, mask, sizes, grad, interpreted)
    else:
        scale = tl.full((), guidance, tl.float32)
        common.store(grad_output, sample, first, lane, mask, sizes, scale * grad, interpreted)
        common.store(grad_uncond, sample, first, lane, mask, sizes, (1.0 - scale) * grad, interpreted)
