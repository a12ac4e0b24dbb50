"""The clipped policy loss with its metrics in one launch; its gradient is the transition's gradient kernel."""

import triton
import triton.language as tl

from ..common import triton_common as common
from ..transition import triton_kernels as transition


@triton.jit
def exponential(x, low):
    """Of the pair: exp, exp - 1 and exp - 1 - x, each to about one rounding of itself; exactly 1, 0 and 0 at 0."""
    held = tl.minimum(tl.maximum(x, -86.0), 89.0)
    # Truncation of what is positive: a floor flushes subnormals.
    whole = (held * 1.44269504 + 128.5).to(tl.int32) - 128
    k = whole.to(tl.float32)
    f = (held - k * 0.693359375) + k * 2.12194440e-4
    # exp(f) - 1 - f, |f| < 0.35
    q = f * 2.7557319e-7 + 2.7557319e-6
    q = q * f + 2.4801587e-5
    q = q * f + 1.9841270e-4
    q = q * f + 1.3888889e-3
    q = q * f + 8.3333333e-3
    q = q * f + 4.1666667e-2
    q = q * f + 1.6666667e-1
    q = (q * f + 0.5) * f * f
    half = common.power(whole + 126)
    near = whole == 0
    ratio = (1.0 + (f + q)) * half * 2.0
    change = tl.where(near, f + q, ((half - 0.5) + half * (f + q)) * 2.0)
    excess = tl.where(near, q, change - x)
    # Far below, where exp leaves float32's normal range, it is 0.
    ratio = tl.where(x < -86.0, 0.0, ratio) * (1.0 + low)
    _, more = common.with_low(change, change * low)
    excess += more
    change += more + low
    number = x == x
    return (
        tl.where(number, tl.where(near, 1.0 + change, ratio), x),
        tl.where(number, change, x),
        tl.where(number, excess, x),
    )


@triton.jit
def put(record, index: tl.constexpr, high, low, silent):
    """One term of a sample; a sample of weight 0 adds nothing, whatever it holds."""
    tl.store(record + index, tl.where(silent, 0.0, high))
    tl.store(record + 16 + index, tl.where(silent, 0.0, low))


@triton.jit
def sample_terms(
    row,
    known,
    sample,
    batch,
    numel,
    step_high,
    step_low,
    reference_high,
    reference_low,
    old_high,
    old_low,
    old_log_prob,
    advantages,
    weights,
    clip_low,
    clip_high,
    advantage_clip,
    kl_weight,
    log_prob,
    ratios,
    has_grad,
    step_scale,
    pull_scale,
    terms,
    ratio_norm: tl.constexpr,
):
    """Everything of one sample that follows from its sums of squares, as in call.h; its terms of the sums."""
    scale, slope = common.column(row, known, 5), common.column(row, known, 1)
    batch_high, batch_low = common.whole(batch)
    numel_high, numel_low = common.whole(numel)
    score = transition.log_prob_of(row, known, step_high, step_low, numel)
    weight = tl.full((), 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + sample)
    silent = weight == 0.0
    # 1 / batch of the policy term's weight, and of the KL's
    share_high, share_low = common.divide(weight, 0.0, batch_high, batch_low)
    policy_high, policy_low = weight, 0.0
    by_log_high, by_log_low = transition.slope_of(row, known, numel)
    log_high, log_low = common.two_sum(score, -tl.load(old_log_prob + sample))
    if ratio_norm:
        tau = common.column(row, known, 2)
        high, low = common.divide(old_high, old_low, numel_high, numel_low)
        high, low = common.multiply(-scale, 0.0, high, low)
        log_high, log_low = common.add(log_high, log_low, high, low)
        log_high, log_low = common.multiply(log_high, log_low, tau, 0.0)
        by_log_high, by_log_low = common.multiply(by_log_high, by_log_low, tau, 0.0)
        policy_high, policy_low = common.divide(weight, 0.0, common.column(row, known, 10), 0.0)
    ratio, change, excess = exponential(log_high, log_low)
    # A row without noise has no ratio, one outside the table (NaN) has nothing: neither may pass for a right one.
    there = silent | (scale < 0.0)
    nan = float("nan")
    ratio, change, excess = tl.where(there, ratio, nan), tl.where(there, change, nan), tl.where(there, excess, nan)
    given = tl.load(advantages + sample)
    bound = tl.full((), advantage_clip, tl.float32)
    advantage = tl.where(given < -bound, -bound, tl.where(given > bound, bound, given))
    below, above = tl.full((), clip_low, tl.float32), tl.full((), clip_high, tl.float32)
    # Compared as differences from 1, which keep the bits that a range of 1e-6 needs.
    beyond = tl.where(advantage > 0.0, change > above, (advantage < 0.0) & (change < -below))
    bounded = tl.where(advantage > 0.0, above, -below)
    near = tl.abs(change) < 0.25
    rest = tl.where(beyond, bounded, tl.where(near, change, 0.0))
    rho_high, rho_low = common.two_sum(tl.where(near | beyond, 1.0, ratio), rest)
    term_high, term_low = common.multiply(-advantage, 0.0, rho_high, rho_low)
    # An advantage of 0 gives 0 even where the ratio has overflown.
    term_high = tl.where(there & (advantage == 0.0), 0.0, term_high)
    term_low = tl.where(there & (advantage == 0.0), 0.0, term_low)
    kl_high, kl_low = common.divide(reference_high, reference_low, numel_high, numel_low)
    square_high, square_low = common.two_product(slope, slope)
    bend_high, bend_low = common.multiply(-scale, 0.0, square_high, square_low)
    kl_high, kl_low = common.multiply(bend_high, bend_low, kl_high, kl_low)

    high, low = common.divide(policy_high, policy_low, batch_high, batch_low)
    high, low = common.multiply(high, low, term_high, term_low)
    high, low = common.multiply(high, low, by_log_high, by_log_low)
    by_step = tl.where(silent | beyond, 0.0, high + low)
    penalty = tl.full((), kl_weight, tl.float32)
    high, low = common.multiply(share_high, share_low, penalty, 0.0)
    high, low = common.multiply(high, low, 2.0 * bend_high, 2.0 * bend_low)
    high, low = common.divide(high, low, numel_high, numel_low)
    by_pull = tl.where(silent, 0.0, high + low)
    tl.store(log_prob + sample, score)
    tl.store(ratios + sample, ratio)
    tl.store(step_scale + sample, by_step)
    tl.store(pull_scale + sample, by_pull)
    tl.store(has_grad + sample, (by_step != 0.0) | (by_pull != 0.0))

    record = terms + sample * 32
    zero = tl.full((), 0.0, tl.float32)
    ratio_high, ratio_low = common.two_sum(tl.where(near, 1.0, ratio), tl.where(near, change, 0.0))
    put(record, 0, zero + 1.0, zero, silent)
    put(record, 1, beyond.to(tl.float32), zero, silent)
    put(record, 2, (advantage != given).to(tl.float32), zero, silent)
    put(record, 3, ratio_high, ratio_low, silent)
    put(record, 4, tl.abs(change), zero, silent)
    put(record, 5, excess, zero, silent)
    put(record, 6, kl_high, kl_low, silent)
    put(record, 7, term_high, term_low, silent)
    high, low = common.multiply(policy_high, policy_low, term_high, term_low)
    more_high, more_low = common.multiply(weight, 0.0, penalty, 0.0)
    more_high, more_low = common.multiply(more_high, more_low, kl_high, kl_low)
    more_high, more_low = tl.where(penalty == 0.0, 0.0, more_high), tl.where(penalty == 0.0, 0.0, more_low)
    high, low = common.add(high, low, more_high, more_low)
    put(record, 8, high, low, silent)


@triton.jit
def write_loss(terms, batch, loss, metrics, lanes: tl.constexpr):
    """Loss and metrics from every sample's terms."""
    high, low, largest = common.total(terms, batch, 16, lanes)
    column = tl.arange(0, 16)
    samples = common.pick(high, 0, 16)
    batch_high, batch_low = common.whole(batch)
    over = tl.where(column == 8, batch_high, tl.where(column == 0, 1.0, tl.maximum(samples, 1.0)))
    over_low = tl.where(column == 8, batch_low, 0.0)
    high, low = common.divide(high, low, over, over_low)
    value = tl.where(column == 4, largest, high + low)
    tl.store(metrics + column, value, mask=column < 8)
    tl.store(loss + (column - 8), value, mask=column == 8)


@triton.jit(do_not_specialize=["table_rows", "step_index", "batch", "blocks"])
def policy_loss_kernel(
    latents,
    output,
    uncond,
    next_latents,
    reference,
    old_output,
    sizes,
    table,
    table_rows,
    step,
    step_index,
    guidance,
    old_log_prob,
    advantages,
    weights,
    clip_low,
    clip_high,
    advantage_clip,
    kl_weight,
    batch,
    numel,
    blocks,
    partials,
    terms,
    tickets,
    loss,
    log_prob,
    ratios,
    metrics,
    has_grad,
    step_scale,
    pull_scale,
    rounded: tl.constexpr,
    wide: tl.constexpr,
    interpreted: tl.constexpr,
    block: tl.constexpr,
    lanes: tl.constexpr,
):
    """One pass over the latents; each sample's last block writes its numbers, the last sample loss and metrics."""
    sample, part, first = common.place(blocks, block, wide)
    row, _index, known = common.row_of(table, table_rows, step, step_index, sample)
    lane = tl.arange(0, block)
    mask = lane < numel - first
    dtype: tl.constexpr = output[0].dtype.element_ty if uncond is None else tl.float32
    x = common.load(latents, sample, first, lane, mask, sizes, interpreted)
    velocity = transition.guided(output, uncond, sample, first, lane, mask, sizes, guidance, interpreted)
    mean = transition.mean_of(row, known, x, velocity, dtype, rounded, interpreted)
    stored = common.load(next_latents, sample, first, lane, mask, sizes, interpreted)
    high, low = common.sum_squares(tl.where(mask, stored - mean, 0.0))
    mine = partials + sample * blocks * 8
    record = mine + part.to(tl.int64) * 8
    tl.store(record, high)
    tl.store(record + 4, low)
    if reference is not None:
        other = common.load(reference, sample, first, lane, mask, sizes, interpreted)
        high, low = common.sum_squares(tl.where(mask, velocity - other, 0.0))
        tl.store(record + 1, high)
        tl.store(record + 5, low)
    if old_output is not None:
        other = common.load(old_output, sample, first, lane, mask, sizes, interpreted)
        old_mean = transition.mean_of(row, known, x, other, dtype, rounded, interpreted)
        high, low = common.sum_squares(tl.where(mask, mean - old_mean, 0.0))
        tl.store(record + 2, high)
        tl.store(record + 6, low)
    if common.take_ticket(tickets, sample, blocks):
        highs, lows, _largest = common.total(mine, blocks, 4, lanes)
        reference_high, reference_low = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        if reference is not None:
            reference_high, reference_low = common.pick(highs, 1, 4), common.pick(lows, 1, 4)
        sample_terms(
            row,
            known,
            sample,
            batch,
            numel,
            common.pick(highs, 0, 4),
            common.pick(lows, 0, 4),
            reference_high,
            reference_low,
            common.pick(highs, 2, 4),
            common.pick(lows, 2, 4),
            old_log_prob,
            advantages,
            weights,
            clip_low,
            clip_high,
            advantage_clip,
            kl_weight,
            log_prob,
            ratios,
            has_grad,
            step_scale,
            pull_scale,
            terms,
            old_output is not None,
        )
        if common.take_ticket(tickets, batch, batch):
            write_loss(terms, batch, loss, metrics, lanes // 4)
