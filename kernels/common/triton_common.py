"""What the Triton kernels share: operands, rounding, noise, order-free sums, and numbers held as pairs of floats.

An operand is `(pointer, batch stride, strides)`; without strides a sample is one run. No `.f64` anywhere: what the
C++ kernels hold in double is here a pair `(high, low)` of floats whose sum it is.
"""

import triton
import triton.language as tl


@triton.jit
def place(blocks, block: tl.constexpr, wide: tl.constexpr):
    """Of this program: sample (64 bits), block, first element in the sample (64 bits only for huge samples)."""
    program = tl.program_id(0)
    part = program % blocks
    first = part.to(tl.int64) * block if wide else part * block
    return (program // blocks).to(tl.int64), part, first


@triton.jit
def where_used(lane, left, used):
    """Mask of the elements that are left, of none where a sample is not used."""
    return lane < tl.where(used, left, 0)


@triton.jit
def addresses(operand, sample, first, lane, sizes):
    """Where a block's elements are."""
    where = operand[0] + sample * operand[1]
    if len(operand[2]) == 0:
        where = where + first + lane
    else:
        rest = first + lane
        for dim in tl.static_range(len(sizes) - 1, -1, -1):
            if dim == 0:
                where += rest.to(tl.int64) * operand[2][dim]
            else:
                where += (rest % sizes[dim]).to(tl.int64) * operand[2][dim]
                rest = rest // sizes[dim]
    return where


@triton.jit
def widen(value, interpreted: tl.constexpr):
    """A stored value as float32."""
    # The interpreter misreads bfloat16 subnormals.
    if interpreted and value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def load(operand, sample, first, lane, mask, sizes, interpreted: tl.constexpr):
    """A block's elements as float32, 0 where masked."""
    return widen(tl.load(addresses(operand, sample, first, lane, sizes), mask=mask, other=0.0), interpreted)


@triton.jit
def narrow(value, dtype: tl.constexpr, interpreted: tl.constexpr):
    """float32 rounded to nearest even, to `dtype`."""
    # The interpreter truncates to bfloat16.
    if interpreted and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        stored = tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = value.to(dtype)
    return stored


@triton.jit
def store(operand, sample, first, lane, mask, sizes, value, interpreted: tl.constexpr):
    """Writes a block's elements, rounded to the operand's dtype."""
    target = addresses(operand, sample, first, lane, sizes)
    tl.store(target, narrow(value, operand[0].dtype.element_ty, interpreted), mask=mask)


@triton.jit
def row_of(table, rows, step, step_index, sample):
    """The sample's row: its address, its index, and whether the table has it."""
    index = tl.full((), step_index, tl.int64)
    if step is not None:
        index = tl.load(step + sample)
    return table + index * 11, index, (index >= 0) & (index < rows)


@triton.jit
def column(row, known, index: tl.constexpr):
    """One coefficient of a row; NaN where the table has no such row, so that all that follows is NaN."""
    return tl.load(row + index, mask=known, other=float("nan"))


@triton.jit
def with_low(high, low):
    """A pair; a remainder that is not finite says nothing and is dropped."""
    return high, tl.where(low - low == 0.0, low, 0.0)


@triton.jit
def two_sum(a, b):
    """The exact sum."""
    high = a + b
    shadow = high - a
    return with_low(high, (a - (high - shadow)) + (b - shadow))


@triton.jit
def two_product(a, b):
    """The exact product, from halves of 12 bits: the interpreter has no fused multiply-add."""
    product = a * b
    a_high = a * 4097.0 - (a * 4097.0 - a)
    b_high = b * 4097.0 - (b * 4097.0 - b)
    a_low, b_low = a - a_high, b - b_high
    return with_low(product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low)


@triton.jit
def add(a_high, a_low, b_high, b_low):
    """Sum of two pairs."""
    high, low = two_sum(a_high, b_high)
    return two_sum(high, low + (a_low + b_low))


@triton.jit
def multiply(a_high, a_low, b_high, b_low):
    """Product of two pairs."""
    high, low = two_product(a_high, b_high)
    high, low = with_low(high, low + (a_high * b_low + a_low * b_high))
    return two_sum(high, low)


@triton.jit
def divide(a_high, a_low, b_high, b_low):
    """Quotient of two pairs."""
    quotient = tl.div_rn(a_high, b_high)
    high, low = multiply(quotient, 0.0, b_high, b_low)
    high, low = add(a_high, a_low, -high, -low)
    quotient, low = with_low(quotient, tl.div_rn(high, b_high))
    return two_sum(quotient, low)


@triton.jit
def whole(number):
    """An integer as a pair."""
    wide = tl.full((), number, tl.int64)
    high = wide.to(tl.float32)
    return high, (wide - high.to(tl.int64)).to(tl.float32)


@triton.jit
def magnitude(value):
    """Bits that order floats by size, NaN last."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power(biased):
    """2^(biased - 127)."""
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(top):
    """Biased exponent of the largest term of a fixed-point sum, and by how much small terms are lifted first."""
    lift = tl.where((top >> 23) < 64, 100, 0)
    return (top >> 23) + lift, lift


@triton.jit
def to_fixed(value, exponent, lift, shift):
    """As a 64-bit integer, the largest term's exponent at bit `shift`; exact but for what lies below bit 0."""
    return (value * power(127 + lift) * power(254 + shift - exponent)).to(tl.int64)


@triton.jit
def from_fixed(fixed, exponent, lift, shift):
    """A fixed-point sum as a pair."""
    unit = power(exponent - shift)
    drop = power(127 - lift)
    high = fixed.to(tl.float32)
    return high * unit * drop, (fixed - high.to(tl.int64)).to(tl.float32) * unit * drop


@triton.jit
def sum_squares(value):
    """Sum of squares of up to 4096 elements, as a pair: added as integers, so layout and order cannot change a bit."""
    shift: tl.constexpr = 49
    square = value * value
    top = tl.max(magnitude(square), axis=0)
    exponent, lift = exponent_of(top)
    fixed = tl.sum(to_fixed(square, exponent, lift, shift), axis=0)
    high, low = from_fixed(fixed, exponent, lift, shift)
    finite = top < 0x7F800000
    return tl.where(finite, high, top.to(tl.float32, bitcast=True)), tl.where(finite, low, 0.0)


@triton.jit
def total(pairs, count, columns: tl.constexpr, lanes: tl.constexpr):
    """Per column: the sum of `count` pairs, and the largest magnitude; [count, 2 columns], highs before lows.

    The sum of integers has no order; one with a term that is not finite is not finite.
    """
    column = tl.arange(0, columns)[None, :]
    lane = tl.arange(0, lanes)[:, None]
    top = tl.zeros([lanes, columns], tl.int32)
    plain = tl.zeros([lanes, columns], tl.float32)
    first = 0
    while first < count:
        row = pairs + (first + lane).to(tl.int64) * (2 * columns) + column
        high = tl.load(row, mask=first + lane < count, other=0.0, cache_modifier=".cg")
        top = tl.maximum(top, magnitude(high))
        plain += high
        first += lanes
    top = tl.max(top, axis=0)
    plain = tl.sum(plain, axis=0)
    # 2^bits > count, so that the sum stays below 2^62.
    bits = (tl.full((), count, tl.int32).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    shift = 61 - bits
    exponent, lift = exponent_of(top)
    fixed = tl.zeros([lanes, columns], tl.int64)
    first = 0
    while first < count:
        row = pairs + (first + lane).to(tl.int64) * (2 * columns) + column
        mask = first + lane < count
        high = tl.load(row, mask=mask, other=0.0, cache_modifier=".cg")
        low = tl.load(row + columns, mask=mask, other=0.0, cache_modifier=".cg")
        fixed += to_fixed(high, exponent[None, :], lift[None, :], shift)
        fixed += to_fixed(low, exponent[None, :], lift[None, :], shift)
        first += lanes
    high, low = from_fixed(tl.sum(fixed, axis=0), exponent, lift, shift)
    finite = top < 0x7F800000
    return tl.where(finite, high, plain), tl.where(finite, low, 0.0), top.to(tl.float32, bitcast=True)


@triton.jit
def pick(vector, index: tl.constexpr, columns: tl.constexpr):
    """One number of a vector."""
    return tl.sum(tl.where(tl.arange(0, columns) == index, vector, 0.0), axis=0)


@triton.jit
def take_ticket(tickets, index, count):
    """Whether this program is the last of `count`; then it sees what the others stored, and the ticket is 0 again."""
    # Every warp's stores come before the one thread's release.
    tl.debug_barrier()
    last = tl.atomic_add(tickets + index, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(tickets + index, 0)
    return last


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10 (Salmon et al., SC 2011)."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def log_positive(x):
    """Natural logarithm of a normal, positive float; the operations of philox.h in its order."""
    bits = x.to(tl.uint32, bitcast=True)
    exponent = (bits >> 23).to(tl.int32) - 126
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    low = m < 0.707106781186547524
    exponent = tl.where(low, exponent - 1, exponent)
    m = tl.where(low, m + m, m) - 1.0
    z = m * m
    y = m * 7.0376836292e-2 - 1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m - 1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m - 1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m - 2.4999993993e-1
    y = y * m + 3.3333331174e-1
    y = y * m * z
    e = exponent.to(tl.float32)
    y = y - e * 2.12194440e-4
    y = y - z * 0.5
    return (m + y) + e * 0.693359375


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals from two words; the operations of philox.h in its order."""
    uniform = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    squared = log_positive(uniform) * -2.0
    radius = tl.sqrt_rn(tl.where(squared > 0.0, squared, 0.0))
    quadrant = (angle_word + 0x20000000) >> 30
    t = (angle_word - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    z = t * t
    s = ((z * -1.9515295891e-4 + 8.3321608736e-3) * z - 1.6666654611e-1) * z * t + t
    c = ((z * 2.443315711809948e-5 - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - z * 0.5 + 1.0
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    return radius * cosine.to(tl.float32, bitcast=True), radius * sine.to(tl.float32, bitcast=True)


@triton.jit
def normals(key0, key1, name, step, first, block: tl.constexpr):
    """Standard normals of a block's elements: key = seed, counter = (element / 4, step, sample id low, high)."""
    c0, c1, c2, c3 = philox(
        (first // 4).to(tl.uint32) + tl.arange(0, block // 4).to(tl.uint32),
        step.to(tl.uint32),
        name.to(tl.uint32),
        (name >> 32).to(tl.uint32),
        key0.to(tl.uint32, bitcast=True),
        key1.to(tl.uint32, bitcast=True),
    )
    first0, second0 = box_muller(c0, c1)
    first1, second1 = box_muller(c2, c3)
    return tl.reshape(tl.join(tl.join(first0, first1), tl.join(second0, second1)), [block])
