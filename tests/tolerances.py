"""How far a result may lie from the truth. The tests themselves contain no tolerances.

Truth is the reference in float64 on the exact low-precision inputs. The budget, twice the sum of the error that plain
torch makes in the same dtype and one rounding of the output, is the package's own (`ops/_budget.py`). Where the output
is itself float64, the truth is no more precise than it, and the two only have to be the same formula.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dancegrpo_fast.ops._budget import budget

# Two float64 evaluations of one formula differ by accumulated roundings, a wrong formula by far more.
FORMULA = torch.finfo(torch.float64).eps ** 0.75
# Fixed seeds make the statistical tests repeatable; a sound generator passes for almost every seed.
SIGNIFICANCE = 1e-3
# The kernels' own float32 logarithm, sine and cosine against rounded float64 ones: the worst of 4 million.
NOISE_ULPS = 4
# A memory plan composed of few blocks against all of them.
COMPOSED = 0.005
# A memory plan against another counter's figures, published with two or three digits.
PUBLISHED = 0.02
# Predicted bytes against measured ones: what the trainer's own loop keeps a call longer than needed is not predicted.
PREDICTED_BYTES = 0.02
# GiB that `checkpointing auto` may miss of what it fills where reward models take most: margins grow with the replay.
AUTO_FILLS = 0.1
# Kernels among themselves evaluate the same polynomials; what may differ is a root.
KERNELS_APART_ULPS = 2


def assert_within_budget(actual: Tensor, truth: Tensor, plain: Tensor, source: float = 0.0) -> None:
    """`actual` within twice (the worst error of `plain` + one rounding) of `truth`; like `plain` in shape.

    A single number may be right by luck in plain torch. `source` is the error that plain torch makes in the
    values which that number is computed from.
    """
    assert actual.shape == plain.shape and actual.dtype == plain.dtype
    assert truth.dtype == torch.float64
    assert torch.equal(actual.isnan(), truth.isnan())
    if actual.dtype == torch.float64:
        assert_same_formula(actual, truth)
        return
    finite = truth.isfinite() & plain.isfinite()
    overflow = ~finite & ~truth.isnan()
    assert torch.equal(actual[overflow], plain[overflow])
    allowed = budget(truth, plain, source)
    off = (actual.double() - truth).abs()
    bad = finite & ~(off <= allowed)
    assert not bool(bad.any()), f"{int(bad.sum())} values off by up to {off[bad].max()}, budget {allowed[bad].min()}"


# A handful of operations after one another, each of which rounds.
CHAIN = 4


# The worst error of a handful of numbers is a draw: another CPU's order of the same sums may make it so much larger.
DRAW = 1.5


def chain_error(truth: Tensor, dtype: torch.dtype) -> float:
    """`source` for a few numbers, in which plain torch may be right by luck: what a short chain in `dtype` may make."""
    return CHAIN * torch.finfo(dtype).eps * float(truth.abs().max())


def assert_same_formula(actual: Tensor, expected: Tensor) -> None:
    """Two float64 evaluations of the same mathematics, relative to the largest value."""
    assert actual.dtype == expected.dtype == torch.float64 and actual.shape == expected.shape
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=FORMULA * scale)


def assert_as_printed(actual: Tensor | float, printed: str) -> None:
    """Equal to a number written in decimal, to half a unit of its last digit."""
    digits = len(printed.partition(".")[2])
    half_unit = 0.5 * 10.0**-digits
    slack = FORMULA * abs(float(printed))
    assert abs(float(actual) - float(printed)) <= half_unit + slack, f"{float(actual)!r}, want {printed}"


def assert_first_order(errors: list[float]) -> None:
    """Errors of an Euler scheme while the number of steps doubles: each about half of the one before."""
    for coarse, fine in pairwise(errors):
        assert 1.5 * fine < coarse, f"{errors} do not halve"


def assert_same_noise(actual: Tensor, expected: Tensor, ulps: int = NOISE_ULPS) -> None:
    """Noise of the kernels and of the reference, in representable numbers apart."""
    assert actual.dtype == expected.dtype == torch.float32

    def ordered(values: Tensor) -> Tensor:
        bits = values.contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    apart = (ordered(actual) - ordered(expected)).abs()
    assert int(apart.max()) <= ulps, f"{int(apart.max())} units in the last place apart"


def assert_standard_normal(values: Tensor) -> None:
    """Moments up to the fourth and the whole distribution (Kolmogorov-Smirnov)."""
    flat = values.flatten().double().numpy()
    bound = float(stats.norm.isf(SIGNIFICANCE / 2))
    # Standard errors of the sample moments of a normal.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(flat**power) - mean) <= bound * math.sqrt(variance / len(flat)), f"moment {power}"
    assert stats.kstest(flat, "norm").pvalue > SIGNIFICANCE


def assert_uncorrelated(first: Tensor, second: Tensor) -> None:
    """Pearson correlation of two draws, and of their squares, not distinguishable from 0."""
    for a, b in ((first, second), (first.square(), second.square())):
        assert stats.pearsonr(a.flatten().double().numpy(), b.flatten().double().numpy()).pvalue > SIGNIFICANCE


def assert_independent(draws: Tensor) -> None:
    """No two of n draws, `[n, N]`, are correlated: among all pairs not one stands out."""
    count = len(draws)
    found = torch.corrcoef(draws.double()).fill_diagonal_(0.0).abs().max()
    bound = float(stats.norm.isf(SIGNIFICANCE / (count * (count - 1)))) / draws.shape[1] ** 0.5
    assert found < bound, f"correlated by {found}, want less than {bound}"


# A float32 resize draws its weights, too, from float32 positions of some dozen pixels, and is divided by about 1/4.
RESIZE_ROUNDINGS = 256
# A few layers of a tower in float32, for the dot product of two unit vectors.
TOWER_ROUNDINGS = 8
# Scores of towers in low precision, which are about 1 in size, and the same in float64: the worst seen is 1.
LOW_PRECISION_ROUNDINGS = 4


def assert_same_resize(actual: Tensor, truth: Tensor) -> None:
    """Normalised pixels of a float32 resize, about 1 in size, and the same in float64."""
    assert actual.dtype == torch.float32 and truth.dtype == torch.float64 and actual.shape == truth.shape
    off = (actual.double() - truth).abs().max()
    assert off <= RESIZE_ROUNDINGS * torch.finfo(torch.float32).eps, f"off by {off}"


def assert_same_cosines(actual: Tensor, truth: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Cosines of embeddings of tiny towers in `dtype`, or scores as large, times `scale`, and the same in float64."""
    assert actual.dtype == torch.float32 and truth.dtype == torch.float64 and actual.shape == truth.shape
    roundings = TOWER_ROUNDINGS if dtype == torch.float32 else LOW_PRECISION_ROUNDINGS
    off = (actual.double() - truth).abs().max()
    assert off <= scale * roundings * torch.finfo(dtype).eps, f"off by {off}"


# Two float32 evaluations of one tiny model, in other batches and with other paddings, over a few steps.
SAMPLE = torch.finfo(torch.float32).eps ** 0.75


def assert_same_sample(actual: Tensor, expected: Tensor) -> None:
    """Two float32 runs of the same sampler and model, relative to the largest value."""
    assert actual.dtype == expected.dtype == torch.float32 and actual.shape == expected.shape
    off, size = (actual - expected).abs().max(), expected.abs().max()
    assert off <= SAMPLE * max(1.0, float(size)), f"off by {off} of {size}"


def assert_same_frames(frames: Tensor, pixels: Tensor) -> None:
    """Frames on the 8-bit grid, and the same pixels in [0, 1] before they were rounded to it."""
    assert frames.shape == pixels.shape and torch.equal(frames, (frames * 255).round().div(255))
    off = float((frames - pixels.float()).abs().max())
    assert off <= 0.5 / 255 + SAMPLE, f"off by {off * 255} levels"


# Adam divides by the root of a gradient's square: where a gradient is all rounding, its step is as large as any.
TRAINING_RELATIVE = 0.05


def assert_same_training(ours: Tensor, other: Tensor) -> None:
    """What two ways to compute an iteration changed is alike as a whole: its difference is short beside it."""
    off = float((ours.double() - other.double()).norm() / other.double().norm())
    assert off < TRAINING_RELATIVE, f"the difference is {off:.3g} of the whole"


# Sums of float32 numbers in another order, through a few calls of a tiny model.
REORDERED_SUMS = torch.finfo(torch.float32).eps ** 0.5
# The same of float64 numbers, through one call.
REORDERED_DOUBLE_SUMS = torch.finfo(torch.float64).eps ** 0.75


def assert_same_gradient(actual: Tensor, truth: Tensor, plain: Tensor) -> None:
    """As a whole within twice (the error of `plain`, autograd in float32, + one rounding) of the float64 gradient."""
    assert actual.dtype == plain.dtype == torch.float32 and truth.dtype == torch.float64
    off, allowed = ((value.double() - truth).norm() for value in (actual, plain))
    allowed = 2 * (allowed + torch.finfo(torch.float32).eps * truth.norm())
    assert off <= allowed, f"off by {off} of {truth.norm()}, budget {allowed}"


# Instructions and registers of a kernel, to those in bench/results: what the compiler may find on another day.
WORSE = 1.03
