"""The device functions that the Triton kernels share: sums, pairs of floats, exponentials, Philox, addresses.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

import math
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dancegrpo_fast.kernels.common import triton_common as common
from dancegrpo_fast.kernels.policy_loss import triton_kernels as loss
from dancegrpo_fast.ops import _triton

from ..ops.cases import BF16, F32, bits
from ..ops.test_dtypes import every_pattern, hard_floats
from ..ops.test_noise import KNOWN
from ..tolerances import assert_same_formula, assert_within_budget

BLOCK, LANES = _triton.BLOCK, _triton.LANES


@triton.jit
def squares_kernel(values, out, block: tl.constexpr):
    """Sum of squares of one block."""
    high, low = common.sum_squares(tl.load(values + tl.arange(0, block)))
    tl.store(out, high)
    tl.store(out + 1, low)


@triton.jit
def total_kernel(pairs, count, out, columns: tl.constexpr, lanes: tl.constexpr):
    """Sum per column."""
    high, low, top = common.total(pairs, count, columns, lanes)
    column = tl.arange(0, columns)
    tl.store(out + column, high)
    tl.store(out + columns + column, low)
    tl.store(out + 2 * columns + column, top)


@triton.jit
def pairs_kernel(a, b, out, block: tl.constexpr):
    """Sum, product and quotient of pairs."""
    lane = tl.arange(0, block)
    a_high, a_low, b_high, b_low = (
        tl.load(a + lane),
        tl.load(a + block + lane),
        tl.load(b + lane),
        tl.load(b + block + lane),
    )
    for index in tl.static_range(3):
        if index == 0:
            high, low = common.add(a_high, a_low, b_high, b_low)
        elif index == 1:
            high, low = common.multiply(a_high, a_low, b_high, b_low)
        else:
            high, low = common.divide(a_high, a_low, b_high, b_low)
        tl.store(out + 2 * index * block + lane, high)
        tl.store(out + (2 * index + 1) * block + lane, low)


@triton.jit
def exponential_kernel(values, out, block: tl.constexpr):
    """exp, exp - 1, exp - 1 - x."""
    lane = tl.arange(0, block)
    value = tl.load(values + lane)
    first, second, third = loss.exponential(value, tl.zeros_like(value))
    tl.store(out + lane, first)
    tl.store(out + block + lane, second)
    tl.store(out + 2 * block + lane, third)


@triton.jit
def philox_kernel(counter, key, out):
    """One Philox block."""
    c0, c1, c2, c3 = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    c0, c1, c2, c3 = common.philox(c0, c1, c2, c3, tl.load(key), tl.load(key + 1))
    tl.store(out, c0)
    tl.store(out + 1, c1)
    tl.store(out + 2, c2)
    tl.store(out + 3, c3)


@triton.jit
def address_kernel(operand, sizes, samples, firsts, out, block: tl.constexpr):
    """Where elements lie, as distances from the operand's start; nothing is read."""
    program = tl.program_id(0)
    lane = tl.arange(0, block)
    where = common.addresses(operand, tl.load(samples + program), tl.load(firsts + program), lane, sizes)
    tl.store(out + program * block + lane, where.to(tl.int64) - operand[0].to(tl.int64))


@triton.jit
def place_kernel(out, blocks, block: tl.constexpr, wide: tl.constexpr):
    """Sample, block and first element of a program."""
    sample, part, first = common.place(blocks, block, wide)
    tl.store(out, sample)
    tl.store(out + 1, part.to(tl.int64))
    tl.store(out + 2, tl.full((), first, tl.int64))


@triton.jit
def convert_kernel(values, out, block: tl.constexpr):
    """Through the kernels' own load and store."""
    first = tl.program_id(0) * block
    lane = tl.arange(0, block)
    mask = lane < block
    value = common.load((values, 0, ()), 0, first, lane, mask, (), True)
    common.store((out, 0, ()), 0, first, lane, mask, (), value, True)


def sum_squares(values: Tensor) -> Tensor:
    padded = torch.zeros(BLOCK)
    padded[: len(values)] = values
    out = torch.empty(2)
    squares_kernel[(1,)](padded, out, BLOCK)
    return out


def blocks_of_numbers() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(BLOCK, generator=g)
    spread = normal * torch.logspace(-12, 12, BLOCK)
    outlier = torch.cat([torch.tensor([1.0]), torch.full((BLOCK - 1,), 1e-4)])
    return {
        "normal": normal,
        "spread": spread,
        "one outlier": outlier,
        "equal": torch.full((BLOCK,), 1 - 2.0**-24),
        "one": torch.tensor([0.3]),
        "large": normal * 1e17,
        "small": normal * 1e-15,
    }


@pytest.mark.parametrize("name", blocks_of_numbers())
def test_sum_of_squares(name: str) -> None:
    """Two floats hold far more than one: the same formula as in float64 on squares rounded to float32."""
    values = blocks_of_numbers()[name]
    exact = math.fsum((values * values).double().tolist())
    found = sum_squares(values).double().sum() / exact
    assert_same_formula(found, torch.ones((), dtype=torch.float64))


def test_order_cannot_change_a_bit() -> None:
    for values in blocks_of_numbers().values():
        wanted = bits(sum_squares(values))
        for seed in range(3):
            order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
            assert bits(sum_squares(values[order])) == wanted


def test_sums_of_nothing_and_of_the_infinite() -> None:
    assert sum_squares(torch.zeros(4)).tolist() == [0.0, 0.0]
    assert sum_squares(torch.full((4,), 1e-45)).tolist() == [0.0, 0.0]
    assert sum_squares(torch.tensor([1.0, -math.inf])).tolist() == [math.inf, 0.0]
    assert sum_squares(torch.tensor([1e30, 1.0])).tolist() == [math.inf, 0.0]
    for values in ([1.0, math.nan], [math.inf, math.nan], [math.nan] * BLOCK):
        assert math.isnan(sum_squares(torch.tensor(values))[0])


@pytest.mark.parametrize("count", [1, 2, LANES - 1, LANES, LANES + 1, 5 * LANES + 3])
def test_total_of_pairs(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    values = torch.randn(count, 4, generator=g, dtype=torch.float64) * torch.tensor([1.0, 1e-9, 1e9, 1.0])
    values[:, 3] -= values[:, 3].mean()
    high = values.float()
    pairs = torch.cat([high, (values - high.double()).float()], dim=1)
    out = torch.empty(3, 4)
    total_kernel[(1,)](pairs, count, out, 4, LANES)
    held = pairs[:, :4].double() + pairs[:, 4:].double()
    scale = held.abs().sum(0).clamp(min=1e-30)
    assert_same_formula(out[:2].double().sum(0) / scale, held.sum(0) / scale)
    assert torch.equal(out[2], high.abs().amax(0))
    order = torch.randperm(count, generator=g)
    again = torch.empty(3, 4)
    total_kernel[(1,)](pairs[order], count, again, 4, LANES)
    assert bits(again) == bits(out)


def test_total_keeps_infinities_and_nan() -> None:
    columns = torch.tensor([[math.inf, math.inf, 1.0, -math.inf], [1.0, -math.inf, math.nan, 2.0]])
    out = torch.empty(3, 4)
    total_kernel[(1,)](torch.cat([columns, torch.zeros(2, 4)], dim=1), 2, out, 4, LANES)
    assert out[0, 0] == math.inf and out[0, 3] == -math.inf and out[0, 1:3].isnan().tolist() == [True, True]
    assert out[1].tolist() == [0.0] * 4 and bool(out[2, 2].isnan())


def test_pairs_are_twice_as_precise() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, generator=g, dtype=torch.float64) * 10.0 ** torch.arange(-16, 16).repeat(2) for _ in "ab")
    split = [torch.stack([v.float(), (v - v.float().double()).float()]) for v in (a, b)]
    out = torch.empty(3, 2, 64)
    pairs_kernel[(1,)](*split, out, 64)
    held = [[Fraction(float(h)) + Fraction(float(lo)) for h, lo in zip(*s.tolist(), strict=True)] for s in split]
    results = ([x + y for x, y in zip(*held, strict=True)], [x * y for x, y in zip(*held, strict=True)])
    for found, wanted in zip(out, (*results, [x / y for x, y in zip(*held, strict=True)]), strict=True):
        relative = [float((Fraction(h) + Fraction(lo)) / w) for h, lo, w in zip(*found.tolist(), wanted, strict=True)]
        assert_same_formula(torch.tensor(relative, dtype=torch.float64), torch.ones(64, dtype=torch.float64))


def exponentials(values: Tensor) -> Tensor:
    out = torch.empty(3, len(values))
    exponential_kernel[(1,)](values, out, len(values))
    return out


def test_exponential() -> None:
    small = torch.logspace(-12, math.log10(0.3), 448)
    values = torch.cat([small, -small, torch.linspace(-80.0, 88.5, 128)])
    x = values.double()
    # Below 1e-3 the difference exp - 1 - x cancels even in float64.
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))
    excess = torch.where(x.abs() < 1e-3, series, torch.expm1(x) - x)
    plain = (values.exp(), values.expm1(), excess.float())
    for found, truth, rounded in zip(exponentials(values), (x.exp(), torch.expm1(x), excess), plain, strict=True):
        # Relative to the value, so that each one is held to its own last place.
        assert_within_budget((found.double() / truth).float(), torch.ones_like(truth), (rounded / truth).float())


def test_exponential_is_exact_where_it_matters() -> None:
    values = torch.zeros(16)
    values[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-23])
    ratio, change, excess = exponentials(values)
    assert ratio[:4].tolist() == [1.0, 1.0, math.inf, 0.0] and change[:4].tolist() == [0.0, 0.0, math.inf, -1.0]
    assert excess[:2].tolist() == [0.0, 0.0] and excess[3] == math.inf
    assert bool(ratio[4].isnan()) and bool(change[4].isnan()) and bool(excess[4].isnan())
    assert ratio[5] == 1.0 + values[5] and change[5] == torch.expm1(values[5:6])


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers_of_philox(counter: tuple, key: tuple, wanted: tuple) -> None:
    out = torch.empty(4, dtype=torch.uint32)
    philox_kernel[(1,)](torch.tensor(counter, dtype=torch.uint32), torch.tensor(key, dtype=torch.uint32), out)
    assert tuple(out.tolist()) == wanted


def test_conversions_round_as_torch_does() -> None:
    """The interpreter truncates to bfloat16 and misreads its subnormals; the kernels do not."""
    values = hard_floats(BF16).flatten()[: 40 * BLOCK]
    out = torch.empty(len(values), dtype=BF16)
    convert_kernel[(len(values) // BLOCK,)](values, out, BLOCK)
    wanted = values.to(BF16)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert bits(out[~out.isnan()]) == bits(wanted[~wanted.isnan()])
    patterns = every_pattern(BF16).flatten()
    wide = torch.empty(len(patterns), dtype=F32)
    convert_kernel[(len(patterns) // BLOCK,)](patterns, wide, BLOCK)
    assert torch.equal(wide.isnan(), patterns.isnan())
    assert bits(wide[~wide.isnan()]) == bits(patterns.float()[~patterns.isnan()])


HUGE = 2**33 + 16


@pytest.mark.parametrize(
    ("strides", "sizes", "first_dtype"),
    [
        ((), (), torch.int64),
        ((), (), torch.int32),
        ((3,), (2**31 - 5,), torch.int32),
        ((2**31 + 3, 70_001, 2), (5, 1013, 509), torch.int32),
        ((HUGE, 2**20, 1030, 3), (700, 70, 60, 51), torch.int64),
    ],
    ids=str,
)
def test_addresses_past_32_bits(strides: tuple[int, ...], sizes: tuple[int, ...], first_dtype: torch.dtype) -> None:
    """Samples, strides and elements that no machine here could hold; nothing is read."""
    last = math.prod(sizes) - 16 if sizes else (2**40 if first_dtype == torch.int64 else 2**31 - 16)
    firsts = torch.tensor([0, 16, 4096, last - 16, last], dtype=first_dtype)
    samples = torch.tensor([0, 1, 2, 70_000, 2**31 - 1])
    out = torch.empty(5, 16, dtype=torch.int64)
    address_kernel[(5,)]((torch.empty(4, dtype=BF16), HUGE, strides), sizes, samples, firsts, out, 16)
    for found, sample, first in zip(out.tolist(), samples.tolist(), firsts.tolist(), strict=True):
        for lane, distance in enumerate(found):
            rest, offset = first + lane, 0
            for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
                rest, place = divmod(rest, size)
                offset += place * stride
            wanted = sample * HUGE + (offset if strides else first + lane)
            # Two bytes an element, in the 64-bit arithmetic of addresses.
            assert (distance - 2 * wanted) % 2**64 == 0


@pytest.mark.parametrize("numel", [1, BLOCK, 806_400, 2**31 - BLOCK, 2**31 - 1, 2**31, 2**33])
def test_places_of_programs(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far programs of launches past 2^31 elements, by telling the interpreter to be them."""
    from triton.runtime.interpreter import interpreter_builder as builder

    batch = min(512, (2**31 - 1) // -(-numel // BLOCK))
    programs, blocks = _triton.programs_for(batch, numel)

    def far(program: int) -> None:
        builder.grid_idx = (program, 0, 0)

    for program in {0, 1 % programs, blocks - 1, programs // 2, programs - 1}:
        out = torch.empty(3, dtype=torch.int64)
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z, program=program: far(program))
        place_kernel[(1,)](out, blocks, BLOCK, _triton.needs_wide(numel))
        sample, part, first = out.tolist()
        assert (sample, part, first) == (program // blocks, program % blocks, program % blocks * BLOCK)
        assert first < numel and (_triton.needs_wide(numel) or first + BLOCK <= 2**31)
