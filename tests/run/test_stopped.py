"""A run that a signal ends loses no whole iteration, and the resumed run has the bits of an uninterrupted one."""

import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.cli import main
from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.optimizer import Optimizer

from ..train import tiny
from .bits import assert_same_run, rows

# What happens at which call of a kind; calls are counted from 1.
PLANNED: dict[tuple[str, int], Callable[[], None]] = {}
CALLS: dict[str, int] = {}


def called(kind: str) -> None:
    CALLS[kind] = CALLS.get(kind, 0) + 1
    PLANNED.get((kind, CALLS[kind]), lambda: None)()


def fail() -> None:
    raise KeyError("judge gone")


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


class Noisy(tiny.Brightness):
    """Its scores have noise of torch's own generator in them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        noise = 1e-3 * torch.rand(len(inputs.prompts))
        called(self.kind)
        return super().__call__(inputs) + noise


@pytest.fixture(autouse=True)
def nothing_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    PLANNED.clear()
    CALLS.clear()

    def watch(owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            called(kind)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(Optimizer, "step", "update")
    watch(checkpoint, "save", "save")


def noisy(kind: str) -> tiny.RewardSettings:
    return tiny.RewardSettings(f"{__name__}:Noisy", args={"kind": kind})


def write(flux: Path, folder: Path, **changes: Any) -> Path:
    judged = tiny.EvaluationSettings(every=2, samples_per_prompt=2, grid_samples=1, rewards=[noisy("evaluation")])
    small = {"num_steps": 3, "prompts_per_iteration": 1, "group_size": 4, "micro_batch": 4, "updates_per_rollout": 2}
    often = {"iterations": 4, "checkpoint_every": 10, "ema_decay": 0.5, "evaluation": judged}
    folder.mkdir(exist_ok=True)
    recipe = tiny.make_recipe(flux, folder / "run", rewards=[noisy("reward")], **small | often | changes)
    return tiny.write_recipe(recipe, folder / "recipe.yaml")


@pytest.fixture(scope="module")
def whole(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write(flux, tmp_path_factory.mktemp("whole") / "whole")
    assert main(["train", str(recipe)]) == 0
    return recipe.parent / "run"


@pytest.mark.parametrize(
    ("kind", "call", "number", "newest"),
    [
        pytest.param("evaluation", 2, signal.SIGTERM, None, marks=pytest.mark.release),
        # Samples are dropped, updates are finished.
        pytest.param("reward", 3, signal.SIGTERM, 2, marks=pytest.mark.release),
        ("update", 5, signal.SIGUSR1, 3),
        # Between the two samplers of the second evaluation, two sets of prompts each.
        ("evaluation", 7, signal.SIGINT, 2),
        pytest.param("save", 1, signal.SIGHUP, 4, marks=pytest.mark.release),
    ],
)
def test_a_signal_costs_no_whole_iteration(
    flux: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    call: int,
    number: signal.Signals,
    newest: int | None,
) -> None:
    # A test may run where Ctrl-C is ignored.
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    recipe = write(flux, tmp_path / "a run")
    PLANNED[kind, call] = send(number)
    assert main(["train", str(recipe)]) == 128 + number
    said, run = capsys.readouterr().err.splitlines()[-1], recipe.parent / "run"
    resumed = f"dancegrpo-fast train '{recipe}' --resume auto"
    if newest is None:
        begun = f"dancegrpo-fast train: stopped by {number.name}; no checkpoint had been written, begin again with: "
        assert said.startswith(begun) and said.endswith("--resume auto")
        assert not (run / "checkpoints").exists()
    else:
        there = run / "checkpoints" / f"{newest:06d}"
        assert said == f"dancegrpo-fast train: stopped by {number.name}; {there} is whole, go on with: {resumed}"
        assert checkpoint.complete(run / "checkpoints") == [there]
    assert not (run / "model").exists()
    assert main(shlex.split(resumed)[1:]) == 0
    assert_same_run(run, whole)


def test_an_evaluation_reward_that_fails_leaves_a_gap(
    flux: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(flux, tmp_path / "gap", checkpoint_every=2)
    run = recipe.parent / "run"
    saved = []
    PLANNED["evaluation", 6] = lambda: (saved.extend(checkpoint.complete(run / "checkpoints")), fail())[1]
    with pytest.warns(UserWarning, match=r"evaluation 2 \(ODE\) is left out: reward .* failed: KeyError: 'judge gone'"):
        assert main(["train", str(recipe)]) == 0
    assert [path.name for path in saved] == ["000002"]
    wanted = [row for row in rows(whole / "evaluations.jsonl") if (row["iteration"], row["sampler"]) != (2, "ode")]
    assert rows(run / "evaluations.jsonl") == wanted
    assert rows(run / "metrics.jsonl") == rows(whole / "metrics.jsonl")
    assert {"before_after.png", "curves.png"} <= {path.name for path in run.iterdir()}
    # Before anything was trained a score that cannot be had ends the run.
    shutil.rmtree(run)
    CALLS.clear()
    PLANNED.clear()
    PLANNED["evaluation", 1] = fail
    assert main(["train", str(recipe)]) == 1
    assert capsys.readouterr().err.endswith("failed: KeyError: 'judge gone'\n")


def test_what_is_no_number_is_not_saved(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(flux, tmp_path / "gone", checkpoint_every=1, iterations=2, updates_per_rollout=1, evaluation=None)
    run, step = recipe.parent / "run", Optimizer.step

    def broken(self: Optimizer, *arguments: Any) -> torch.Tensor:
        norm = step(self, *arguments)
        if CALLS["update"] == 2:
            name, parameter = list(self._parameters.items())[3]
            parameter.data.view(-1)[-1] = float("inf")
            wanted.append(name)
        return norm

    wanted: list[str] = []
    monkeypatch.setattr(Optimizer, "step", broken)
    assert main(["train", str(recipe)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    # The average has it too.
    assert said.startswith(f"dancegrpo-fast train: iteration 2: model {wanted[0]} and 1 more of ")
    assert said.endswith(f"; the last checkpoint is {run / 'checkpoints' / '000001'}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000001"] and not (run / "model").exists()
