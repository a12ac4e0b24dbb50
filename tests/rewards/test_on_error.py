"""What becomes of samples that a reward cannot score, by `on_error`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.rewards import RewardInput, RewardSet, UnscoredError

NAN = float("nan")


class Fussy:
    """The column `score`, but not for samples with another column, as many times as it says.

    Args:
        how: "says" which and why, returns "nan", or "raises" what concerns all.
    """

    def __init__(self, how: str = "says", compares: bool = False) -> None:
        self.how, self.compares_groups, self.asked = how, compares, list[list[float]]()

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        scores = torch.tensor([columns["score"] for columns in inputs.meta])
        assert torch.equal(inputs.frames.flatten(1)[:, 0], scores) and len(inputs.group) == len(inputs.prompts)
        self.asked.append(scores.tolist())
        bad = {i: columns["fails"] for i, columns in enumerate(inputs.meta) if columns["fails"] >= len(self.asked)}
        if bad and self.how == "raises":
            raise OSError("the server is away")
        for sample in bad:
            scores[sample] = NAN if self.how == "nan" else 1e9
        if bad and self.how == "says":
            raise UnscoredError(scores, {sample: f"fails {times} times" for sample, times in bad.items()})
        return scores


def made(scores: list[float], fails: list[int], group: list[int] | None = None) -> RewardInput:
    meta = [{"score": score, "fails": times} for score, times in zip(scores, fails, strict=True)]
    frames = torch.tensor(scores).view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 2, 2)
    groups = torch.tensor(group or [0] * len(scores))
    return RewardInput(frames, [f"prompt {score:g}" for score in scores], groups, meta)


def asked_of(on_error: str, how: str = "says", **settings: Any) -> tuple[RewardSet, Fussy]:
    args = {"how": how, "compares": settings.pop("compares", False)}
    rewards = RewardSet([RewardSettings(f"{__name__}:Fussy", on_error=on_error, args=args, **settings)])  # type: ignore[arg-type]  # one of its literals
    [fussy] = rewards._rewards
    assert isinstance(fussy, Fussy)
    return rewards, fussy


SAYS = r'reward ".*:Fussy" gave no score to 1 of 3 samples, sample 1 \("prompt 2"\) for one: fails 9 times'


@pytest.mark.parametrize("how", ["says", "nan"])
def test_stop_and_retry_end_the_run(how: str) -> None:
    message = SAYS if how == "says" else "sample 1 .* got nan, want a finite number"
    rewards, fussy = asked_of("stop", how)
    with pytest.raises(RuntimeError, match=message):
        rewards(made([1.0, 2.0, 3.0], [0, 9, 0]))
    assert fussy.asked == [[1.0, 2.0, 3.0]]
    rewards, fussy = asked_of("retry", how)
    with pytest.raises(RuntimeError, match=message):
        rewards(made([1.0, 2.0, 3.0], [0, 9, 0]))
    assert fussy.asked == [[1.0, 2.0, 3.0], [2.0]]


@pytest.mark.parametrize("how", ["says", "nan"])
@pytest.mark.parametrize("on_error", ["retry", "drop"])
def test_samples_are_asked_for_again(on_error: str, how: str) -> None:
    rewards, fussy = asked_of(on_error, how)
    assert rewards(made([1.0, 2.0, 3.0], [0, 1, 1])).tolist() == [[1.0, 2.0, 3.0]]
    assert fussy.asked == [[1.0, 2.0, 3.0], [2.0, 3.0]]


def test_a_dropped_sample_has_no_score() -> None:
    for how in ("says", "nan"):
        rewards, _ = asked_of("drop", how)
        with pytest.warns(UserWarning, match=SAYS + "; they are dropped" if how == "says" else "got nan"):
            found = rewards(made([1.0, 2.0, 3.0], [1, 9, 0]))
        assert found[0, [0, 2]].tolist() == [1.0, 3.0] and found[0, 1].isnan()
    rewards, _ = asked_of("drop", threshold=1.0)
    with pytest.warns(UserWarning, match="dropped"):
        found = rewards(made([1.0, 2.0, 3.0], [0, 9, 0]))
    assert found[0, [0, 2]].tolist() == [0.0, 1.0] and found[0, 1].isnan()


def test_win_rates_are_among_those_that_are_left() -> None:
    rewards, _ = asked_of("drop", win_rate=True)
    with pytest.warns(UserWarning, match="dropped"):
        found = rewards(made([3.0, 9.0, 1.0, 2.0, 5.0, 9.0], [0, 9, 0, 0, 0, 9], [0, 0, 0, 0, 1, 1]))[0]
    assert found[[0, 2, 3]].tolist() == [1.0, 0.0, 0.5]
    # The last group has one sample left, which wins against none.
    assert found[[1, 4, 5]].isnan().all()


def test_what_is_compared_is_asked_for_in_whole_groups() -> None:
    rewards, fussy = asked_of("drop", compares=True)
    rewards(made([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 0], [5, 7, 7, 5]))
    assert fussy.asked == [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0]]


def test_any_other_failure_concerns_every_sample() -> None:
    rewards, fussy = asked_of("retry", "raises")
    assert rewards(made([1.0, 2.0], [1, 0])).tolist() == [[1.0, 2.0]] and len(fussy.asked) == 2
    for on_error in ("stop", "retry"):
        rewards, _ = asked_of(on_error, "raises")
        with pytest.raises(RuntimeError, match=r'^reward ".*:Fussy" failed: OSError: the server is away$') as caught:
            rewards(made([1.0, 2.0], [9, 0]))
        assert isinstance(caught.value.__cause__, OSError)
    rewards, _ = asked_of("drop", "raises")
    with pytest.warns(UserWarning, match="gave no score to 2 of 2 samples, .* the server is away"):
        assert rewards(made([1.0, 2.0], [9, 0])).isnan().all()


def test_more_than_may_be_dropped() -> None:
    rewards, _ = asked_of("drop", max_dropped=0.25, label="judge")
    rewards.check_dropped(torch.tensor([[NAN, 0.0, 1.0, 2.0]]))
    with pytest.raises(RuntimeError, match=r"rewards.max_dropped: judge left out 2 of 4 samples, want at most 0.25"):
        rewards.check_dropped(torch.tensor([[NAN, NAN, 1.0, 2.0]]))


def returned(scores: Any, reasons: dict[int, str]) -> Callable[[RewardInput], torch.Tensor]:
    def reward(inputs: RewardInput) -> torch.Tensor:
        raise UnscoredError(scores, reasons)

    return reward


@pytest.mark.parametrize(
    ("scores", "reasons", "message"),
    [
        (torch.zeros(3), {0: "x"}, r"returned torch.float32 \(3,\), want floats of shape \(2,\)"),
        (None, {0: "x"}, "returned NoneType"),
        (torch.zeros(2), {2: "x"}, r"named samples \[2\], want some of 2"),
    ],
)
def test_an_answer_that_is_none_ends_the_run(scores: Any, reasons: dict[int, str], message: str) -> None:
    rewards, _ = asked_of("drop")
    rewards._rewards = [returned(scores, reasons)]
    with pytest.raises(RuntimeError, match=message):
        rewards(made([1.0, 2.0], [0, 0]))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r'rewards.on_error: got "skip", want "stop" or "retry" or "drop"'):
        RewardSettings("ocr", on_error="skip")  # type: ignore[arg-type]  # what it refuses
    for share in (-0.1, 1.0, NAN):
        with pytest.raises(ValueError, match=r"rewards.max_dropped: got .*, want at least 0, less than 1"):
            RewardSettings("ocr", max_dropped=share)
