"""Samples are scored while the next ones are drawn, and nothing else changes."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.stopping import Stopped
from dancegrpo_fast.train import Trainer
from dancegrpo_fast.train.collect import Collector
from dancegrpo_fast.train.draw import Draw

from ..models import checks
from ..release import release_but
from .tiny import TrainSettings, make_recipe

SECONDS = 60.0  # until a test that would wait for ever fails
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "calls of other groups": {"micro_batch": 3, "group_size": 2, "prompts_per_iteration": 6},
    "best of n": {"best_of_n": 1},
    "best of n, by the batch": {"best_of_n": 1, "advantages": "batch"},
}
drawn_again, queued, calls = threading.Event(), threading.Event(), list[str]()


class Quiet:
    """Mean red; says which thread asks."""

    def __call__(self, inputs: RewardInput) -> Tensor:
        calls.append(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        return inputs.frames[:, :, 0].mean(dim=(1, 2, 3))


class Noisy(Quiet):
    """And a number of torch's generator."""

    def __call__(self, inputs: RewardInput) -> Tensor:
        return super().__call__(inputs) + 0.01 * torch.rand(len(inputs.prompts))


class Waiting(Noisy):
    """Scores the first samples when the next are being drawn."""

    def __call__(self, inputs: RewardInput) -> Tensor:
        assert drawn_again.wait(SECONDS)
        return super().__call__(inputs)


class Failing(Noisy):
    """Cannot score, which it finds out when the next samples wait for it."""

    def __call__(self, inputs: RewardInput) -> Tensor:
        super().__call__(inputs)
        assert queued.wait(SECONDS)
        raise KeyError("no such key")


class Signalled(Noisy):
    """The process gets SIGTERM in the fifth call, once."""

    def __call__(self, inputs: RewardInput) -> Tensor:
        found = super().__call__(inputs)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return found


@pytest.fixture(autouse=True)
def anew() -> None:
    drawn_again.clear()
    queued.clear()
    calls.clear()


def run(base: Path, output: Path, kind: type, resume: str | None = None, **changes: Any) -> list[dict[str, Any]]:
    """The rows of a run, but for its times."""
    rewards = [RewardSettings(name=f"{kind.__module__}:{kind.__name__}")]
    Trainer(make_recipe(base, output, rewards=rewards, **changes), resume).run()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row.keys() - {"seconds", "speed"}} for row in rows]


@pytest.mark.parametrize("name", release_but(("plain", "best of n"), CASES))
def test_nothing_changes(flux: Path, tmp_path: Path, name: str) -> None:
    """Rewards that draw numbers neither, where sets are scored one by one without it, too."""
    kind = Noisy if name == "best of n" else Quiet
    rows, asked = [], []
    for overlap in (True, False):
        torch.manual_seed(0)
        calls.clear()
        rows.append(run(flux, tmp_path / str(overlap), kind, overlap_rewards=overlap, **CASES[name]))
        asked.append(set(calls))
    assert {one.partition("_")[0] for one in asked[0]} == {"rewards"} and asked[1] == {"MainThread"}
    assert rows[0] == rows[1]
    checks.assert_same_weights(tmp_path / "True", tmp_path / "False")


def test_the_next_samples_are_drawn_meanwhile(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = Draw.samples, [0]

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            drawn_again.set()
        return original(*arguments)

    monkeypatch.setattr(Draw, "samples", counted)
    run(flux, tmp_path / "run", Waiting, overlap_rewards=True, iterations=1)
    assert count[0] == len(calls) == 3


def test_a_reward_that_fails_ends_the_run(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is not asked any more."""
    original, count = ThreadPoolExecutor.submit, [0]

    def counted(*arguments: Any) -> Any:
        future = original(*arguments)
        count[0] += 1
        if count[0] == 2:
            queued.set()
        return future

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    with pytest.raises(RuntimeError, match="no such key"):
        run(flux, tmp_path / "run", Failing, overlap_rewards=True)
    assert count == [2] and len(calls) == 1


def test_the_threads_device_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process that of the run has none, which torch does not take."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    recipe = SimpleNamespace(train=SimpleNamespace(overlap_rewards=True))
    processes = SimpleNamespace(device=torch.device("cuda"))
    collector: Any = SimpleNamespace(recipe=recipe, processes=processes, rewards=lambda inputs: inputs)
    with Collector._worker(collector) as worker:
        assert worker is not None
        assert worker(torch.ones(1)).result() == 1
    assert found == [3]


def test_a_signal_leaves_what_is_whole(flux: Path, tmp_path: Path) -> None:
    """The second iteration's samples are dropped, and what their rewards drew is drawn again."""
    torch.manual_seed(0)
    with pytest.raises(Stopped):
        run(flux, tmp_path / "run", Signalled, overlap_rewards=True)
    assert run(flux, tmp_path / "run", Signalled, "auto", overlap_rewards=True)[1]["iteration"] == 2
    calls.clear()
    torch.manual_seed(0)
    run(flux, tmp_path / "whole", Noisy, overlap_rewards=True)
    checks.assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": "retain"}, "got true with passes"),
        ({"sequence_parallel": 2}, "got true with sequence_parallel 2, want 1"),
        ({"offload": ["rewards"]}, 'got true with offload "rewards"'),
    ],
)
def test_what_it_cannot_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"train.overlap_rewards: {message}"):
        TrainSettings(2, 3, 4, 4, overlap_rewards=True, **changes)


def test_one_set_has_nothing_to_overlap_with(flux: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train.overlap_rewards: got true for 4 samples of a process, want whole groups"
    ):
        Trainer(make_recipe(flux, tmp_path / "run", overlap_rewards=True, prompts_per_iteration=1))
