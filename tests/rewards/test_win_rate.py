"""Comparisons within a group, and how settings ask for them."""

import pytest
import torch

from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.rewards import RewardInput, RewardSet
from dancegrpo_fast.rewards.win_rate import win_rates


def listed(inputs: RewardInput) -> torch.Tensor:
    return torch.tensor([columns["score"] for columns in inputs.meta])


def made(scores: list[float], group: list[int]) -> RewardInput:
    meta = [{"score": score} for score in scores]
    return RewardInput(torch.zeros(len(scores), 1, 3, 2, 2), ["x"] * len(scores), torch.tensor(group), meta)


def test_distinct_scores_are_their_ranks() -> None:
    scores = torch.randperm(9, generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(win_rates(scores - 4, torch.zeros(9, dtype=torch.long)), scores / 8)


def test_ties_count_half() -> None:
    group = torch.zeros(4, dtype=torch.long)
    assert win_rates(torch.tensor([1.0, 1.0, 2.0, 0.0]), group).tolist() == [0.5, 0.5, 1.0, 0.0]
    assert win_rates(torch.full((4,), 7.0), group).tolist() == [0.5] * 4


def test_groups_stay_apart_in_any_order() -> None:
    scores, group = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0]), torch.tensor([7, 2, 7, 2, 7])
    assert win_rates(scores, group).tolist() == [1.0, 0.0, 0.0, 1.0, 0.5]


def test_a_reward_set() -> None:
    name = f"{__name__}:listed"
    inputs = made([0.3, 0.1, 0.2, 0.9], [0, 0, 1, 1])
    rewards = RewardSet(
        [RewardSettings(name), RewardSettings(name, win_rate=True, weight=2.0), RewardSettings(name, threshold=0.2)]
    )
    assert rewards.names == ["listed", "listed_win_rate", "listed>0.2"]
    assert rewards.weights == [1.0, 2.0, 1.0]
    found = rewards(inputs)
    assert torch.equal(found[0], listed(inputs))
    assert found[1:].tolist() == [[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]
    assert found.dtype == torch.float32


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"rewards.win_rate: got true beside threshold 0.3"):
        RewardSettings("ocr", win_rate=True, threshold=0.3)
    with pytest.raises(ValueError, match=r"group: got a single sample in group 1"):
        win_rates(torch.zeros(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"group: got shape \(2,\)"):
        win_rates(torch.zeros(3), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="single sample"):
        RewardSet([RewardSettings(f"{__name__}:listed", win_rate=True)])(made([1.0], [0]))
