"""Group-relative advantages and the choice of the best and worst samples."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dancegrpo_fast import group_advantages
from dancegrpo_fast.advantages import best_and_worst, without_spread

from .tolerances import assert_same_formula, assert_within_budget

F64 = torch.float64


def deviation(rewards: list[float], *, unbiased: bool = True) -> float:
    mean = sum(rewards) / len(rewards)
    return math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - (1 if unbiased else 0)))


def by_hand(
    rewards: list[float], *, eps: float = 1e-8, unbiased: bool = True, divide: bool = True, std: float | None = None
) -> list[float]:
    """One group, with a standard deviation of its own where none is given."""
    mean = sum(rewards) / len(rewards)
    std = deviation(rewards, unbiased=unbiased) if std is None else std
    return [(r - mean) / (std + eps if divide else 1.0) for r in rewards]


def rewards_of(groups: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(groups * size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.1])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_formula(size: int, eps: float, divide: bool, unbiased: bool) -> None:
    rewards = rewards_of(5, size)
    found = group_advantages(rewards, size, eps=eps, unbiased=unbiased, divide_by_std=divide)
    wanted = [
        by_hand(group, eps=eps, unbiased=unbiased, divide=divide)
        for group in rewards.double().reshape(5, size).tolist()
    ]
    truth = torch.tensor(wanted, dtype=F64).flatten()
    assert_within_budget(found, truth, truth.float())


@pytest.mark.parametrize("unbiased", [True, False])
def test_deviation_of_the_batch(unbiased: bool) -> None:
    """The mean stays the group's; the deviation mixes the groups, whose means differ."""
    rewards = rewards_of(5, 4) + torch.arange(5).repeat_interleave(4)
    std = deviation(rewards.double().tolist(), unbiased=unbiased)
    truth = torch.tensor([by_hand(g, std=std) for g in rewards.double().reshape(5, 4).tolist()], dtype=F64).flatten()
    found = group_advantages(rewards, 4, unbiased=unbiased, std_of="batch")
    assert_within_budget(found, truth, truth.float())


def test_floor_of_the_deviation() -> None:
    rewards = rewards_of(3, 4) * torch.tensor([1.0, 0.1, 0.01]).repeat_interleave(4)
    groups = rewards.double().reshape(3, 4).tolist()
    floor = deviation(groups[1])
    truth = torch.tensor([by_hand(g, std=max(deviation(g), floor)) for g in groups], dtype=F64).flatten()
    assert_within_budget(group_advantages(rewards, 4, std_floor=floor), truth, truth.float())
    above = torch.tensor([by_hand(g, std=1e3) for g in groups], dtype=F64).flatten()
    assert_within_budget(group_advantages(rewards, 4, std_of="batch", std_floor=1e3), above, above.float())


def test_each_reward_is_limited_before_it_is_weighted() -> None:
    """As the published HunyuanVideo script limits them; the sum may exceed the limit."""
    rewards = torch.stack([rewards_of(2, 30, seed) ** 5 for seed in (0, 1)])
    apart = [group_advantages(one, 30) for one in rewards]
    assert all(one.abs().amax() > 3 for one in apart)
    limited = [one.clamp(-3, 3) for one in apart]
    found = group_advantages(rewards, 30, weights=(0.5, -2.0), clip=3.0)
    truth = 0.5 * limited[0].double() - 2.0 * limited[1].double()
    assert_within_budget(found, truth, 0.5 * limited[0] - 2.0 * limited[1])
    assert found.abs().amax() > 3
    # One reward: limited before or after the sum are the same bits.
    assert torch.equal(group_advantages(rewards[0], 30, clip=3.0), limited[0])


def test_rounding_is_no_spread() -> None:
    """A reward of .97 that differs by 1e-7 teaches nothing; one that differs by 1e-4 does, wherever it lies."""
    noise = rewards_of(2, 12)
    for value in (0.97, -0.97, 0.0, 970.0, 9.7e-7):
        for share, silent in ((1e-7, True), (1e-4, False)):
            if value == 0 and silent:
                continue
            rewards = value + noise * share * (abs(value) or 1.0)
            assert without_spread(rewards, 12).tolist() == [[silent, silent]], (value, share)
            assert bool(group_advantages(rewards, 12).any()) is not silent
            assert bool(group_advantages(rewards.double(), 12, std_of="batch").any()) is not silent
    several = torch.stack([0.97 + noise * 1e-7, noise])
    assert without_spread(several, 12).tolist() == [[True, True], [False, False]]
    assert torch.equal(group_advantages(several, 12), group_advantages(noise, 12))


def test_defaults_are_the_paper_s() -> None:
    rewards = rewards_of(2, 4)
    assert torch.equal(
        group_advantages(rewards, 4),
        group_advantages(rewards, 4, eps=1e-8, unbiased=True, divide_by_std=True),
    )


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, -2.0)])
def test_several_rewards_sum_advantages_not_rewards(weights: tuple | None) -> None:
    """Rewards of different scales count the same."""
    rewards = torch.stack([rewards_of(3, 4, seed) * scale for seed, scale in enumerate((1.0, 1e3, 1e-3))])
    factors = weights or (1.0, 1.0, 1.0)
    truth = torch.zeros(12, dtype=F64)
    for row, factor in zip(rewards.double(), factors, strict=True):
        truth += factor * torch.tensor([by_hand(g) for g in row.reshape(3, 4).tolist()], dtype=F64).flatten()
    found = group_advantages(rewards, 4, weights=weights)
    assert_within_budget(found, truth, truth.float())
    scaled = rewards * torch.tensor([[1.0], [2.0**10], [2.0**-10]])
    assert_same_formula(
        group_advantages(scaled, 4, weights=weights, eps=0.0).double(),
        group_advantages(rewards, 4, weights=weights, eps=0.0).double(),
    )
    assert not torch.equal(found, group_advantages(rewards.sum(0), 4))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3, 1e30, 1e-30])
@pytest.mark.parametrize("size", [2, 3, 7, 12])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_equal_rewards_give_exactly_zero(value: float, size: int, eps: float) -> None:
    """The rounding of the mean must not be divided by a deviation of 0."""
    found = group_advantages(torch.full((2 * size,), value), size, eps=eps)
    assert torch.equal(found, torch.zeros(2 * size))


def test_one_constant_group_leaves_the_others() -> None:
    rewards = rewards_of(3, 4)
    wanted = group_advantages(rewards, 4)
    rewards[4:8] = 0.3
    found = group_advantages(rewards, 4)
    assert torch.equal(found[4:8], torch.zeros(4))
    assert torch.equal(found[:4], wanted[:4]) and torch.equal(found[8:], wanted[8:])


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
def test_computed_in_float64_from_any_dtype(dtype: torch.dtype) -> None:
    rewards = (100.0 + 1e-2 * rewards_of(2, 4)).to(dtype)
    found = group_advantages(rewards, 4)
    assert found.dtype == torch.float32 and found.shape == (8,)
    assert torch.equal(found, group_advantages(rewards.double(), 4))


def test_the_rewards_stay_as_they_were() -> None:
    rewards = rewards_of(2, 4)
    before = rewards.clone()
    group_advantages(rewards, 4)
    assert torch.equal(rewards, before)


def test_groups_of_what_is_valid() -> None:
    """Groups of every size from 4 to 0; what is not valid may be anything."""
    rewards = torch.stack([rewards_of(5, 4), rewards_of(5, 4, 1)])
    valid = torch.tensor(
        [4 * [True], [True, False, True, True], [False, True, True, False], [True] + 3 * [False], 4 * [False]]
    )
    spoilt = torch.where(valid.flatten(), rewards, torch.tensor([float("nan"), float("inf")]).repeat(10))
    found = group_advantages(spoilt, 4, weights=[1.0, -2.0], valid=valid.flatten()).view(5, 4)
    for group, keep in enumerate(valid):
        own = rewards.view(2, 5, 4)[:, group, keep]
        wanted = torch.zeros(4, dtype=F64)
        if len(own[0]) > 1:
            rows = [torch.tensor(by_hand(row), dtype=F64) for row in own.double().tolist()]
            wanted[keep] = rows[0] - 2.0 * rows[1]
        assert_within_budget(found[group], wanted, wanted.float())
    assert torch.equal(found[0], group_advantages(rewards, 4, weights=[1.0, -2.0]).view(5, 4)[0])
    # All, 3 of 3, both, one, none.
    assert best_and_worst(spoilt[0], 4, 2, valid=valid.flatten()).tolist() == [0, 1, 2, 3, 4, 6, 7, 9, 10, 12]
    ends = best_and_worst(spoilt[0], 4, 1, valid=valid.flatten()).tolist()
    three = rewards[0].view(5, 4)[1, [0, 2, 3]]
    places = torch.tensor([4, 6, 7])[torch.stack([three.argmax(), three.argmin()])]
    assert ends[2:] == [*sorted(places.tolist()), 9, 10, 12]


@pytest.mark.parametrize("valid", [torch.ones(7, dtype=torch.bool), torch.ones(8), [True] * 8, torch.ones(2, 4) > 0])
def test_bad_valid(valid) -> None:
    for call in (group_advantages, lambda rewards, size, **options: best_and_worst(rewards, size, 1, **options)):
        with pytest.raises(ValueError, match=r"^valid: got .*, want bool \(8,\)"):
            call(rewards_of(2, 4), 4, valid=valid)


BAD_REWARDS = (
    torch.zeros(()),
    torch.zeros(2, 2, 4),
    torch.zeros(8, dtype=torch.int64),
    torch.zeros(0),
    torch.tensor([0.0, float("nan")]),
    torch.tensor([0.0, float("inf")]),
    torch.zeros(2).to_sparse(),
    None,
    "ab",
    [0.0, None],
    [0.0, float("nan")],
    [[0.0, 1.0], [0.0]],
    1.0,
    object,
)


@pytest.mark.parametrize("rewards", BAD_REWARDS, ids=str)
def test_bad_rewards(rewards) -> None:
    with pytest.raises(ValueError, match=r"^rewards: "):
        group_advantages(rewards, 2)


@pytest.mark.parametrize("as_given", [list, tuple, np.array, torch.Tensor.numpy])
def test_lists_and_arrays_become_tensors(as_given: Callable) -> None:
    rewards = rewards_of(2, 4)
    given = as_given(rewards if as_given is torch.Tensor.numpy else rewards.double().tolist())
    assert torch.equal(group_advantages(given, 4), group_advantages(rewards, 4))
    assert torch.equal(best_and_worst(given, 4, 1), best_and_worst(rewards, 4, 1))
    assert torch.equal(group_advantages([0, 1, 1, 1], 4), group_advantages(torch.tensor([0.0, 1, 1, 1]), 4))
    assert torch.equal(group_advantages(rewards, np.int64(4)), group_advantages(rewards, 4))
    several = torch.stack([rewards, rewards.square()])
    wanted = group_advantages(several, 4, weights=(0.5, 2.0))
    assert torch.equal(group_advantages(several.tolist(), 4, weights=as_given(torch.tensor([0.5, 2.0]))), wanted)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("eps", (float("nan"), -1.0, float("inf"), None, "1", True, torch.tensor(1.0))),
        ("weights", ([float("nan")], [float("inf")], ["a"], [None], 1.0, "1", {}, [[1.0]])),
        ("unbiased", (None, 1, "no", 0.0)),
        ("divide_by_std", (None, 1, "no", torch.tensor(True))),
        ("std_of", (None, "rewards", 1)),
        ("std_floor", (float("nan"), -1.0, float("inf"), None, "1")),
        ("clip", (float("nan"), -1.0, None, "1")),
    ],
)
def test_bad_options(name: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            group_advantages(rewards_of(2, 4), 4, **{name: value})


@pytest.mark.parametrize("size", [-2, 0, 1, 3, 16, None, 4.0, True, "4", [4], torch.tensor(4)])
def test_bad_group_size(size) -> None:
    with pytest.raises(ValueError, match=r"^group_size: "):
        group_advantages(rewards_of(2, 4), size)
    with pytest.raises(ValueError, match=r"^group_size: "):
        best_and_worst(rewards_of(2, 4), size, 1)


@pytest.mark.parametrize("weights", [(), (1.0,), (1.0, 1.0, 1.0)])
def test_bad_weights(weights: tuple) -> None:
    with pytest.raises(ValueError, match=r"^weights: "):
        group_advantages(torch.stack([rewards_of(2, 4)] * 2), 4, weights=weights)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_best_and_worst(k: int) -> None:
    advantages = rewards_of(5, 6)
    kept = best_and_worst(advantages, 6, k)
    wanted: list[int] = []
    for first in range(0, 30, 6):
        order = sorted(range(first, first + 6), key=lambda i: advantages[i].item())
        wanted += order[:k] + order[-k:]
    assert kept.dtype == torch.int64 and kept.tolist() == sorted(wanted)


def test_ties_keep_the_earlier_sample() -> None:
    assert best_and_worst(torch.tensor([1.0, 3.0, 3.0, 0.0]), 4, 1).tolist() == [1, 3]
    assert best_and_worst(torch.tensor([3.0, 1.0, 1.0, 2.0]), 4, 1).tolist() == [0, 1]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_advantages_keep_distinct_samples(k: int) -> None:
    kept = best_and_worst(torch.zeros(16), 8, k).tolist()
    assert len(set(kept)) == len(kept) == 4 * k


@pytest.mark.parametrize("k", [-1, 0, 3, None, 1.0, True, "1"])
def test_bad_k(k) -> None:
    with pytest.raises(ValueError, match=r"^k: "):
        best_and_worst(rewards_of(2, 4), 4, k)


def test_one_row_of_advantages() -> None:
    with pytest.raises(ValueError, match=r"^advantages: "):
        best_and_worst(torch.zeros(2, 4), 4, 1)


@pytest.mark.parametrize("advantages", BAD_REWARDS, ids=str)
def test_bad_advantages(advantages) -> None:
    with pytest.raises(ValueError, match=r"^advantages: "):
        best_and_worst(advantages, 2, 1)
