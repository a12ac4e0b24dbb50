"""Runs in processes that are killed: they go on to the bits of one that was not, and keep nobody out."""

import os
import random
import signal
import socket
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from dancegrpo_fast.run.folder import RunDirectory
from dancegrpo_fast.train.loop import Trainer

from ..processes import LIMIT, forked
from ..release import release_but
from ..train.tiny import EvaluationSettings, RewardSettings, make_recipe, write_recipe
from .bits import assert_same_run, rows

RUNNER = """
from dancegrpo_fast.cli import main
raise SystemExit(main(["train", *arguments]))
"""

HOLDER = """
import time
from pathlib import Path
from dancegrpo_fast.run.folder import RunDirectory
RunDirectory(Path(root)).claim()
Path(root, "claimed").touch()
time.sleep(600)
"""

REWARDS = """
import time
class Brightness:
    def __call__(self, inputs):
        time.sleep(0.05)
        return inputs.frames[:, :, 0].mean(dim=(1, 2, 3))
"""


@pytest.fixture
def workspace(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    slow = [RewardSettings("tiny_rewards:Brightness")]
    judged = EvaluationSettings(every=2, samples_per_prompt=3, grid_samples=2, rewards=slow)
    often = {"iterations": 6, "updates_per_rollout": 2, "checkpoint_every": 2}
    recipe = make_recipe(base, tmp_path / "run", rewards=slow, evaluation=judged, timestep_fraction=1.0, **often)
    return write_recipe(recipe, tmp_path / "recipe.yaml").parent


def start(workspace: Path, output: str, *options: str) -> ForkServerProcess:
    arguments = [str(workspace / "recipe.yaml"), "--output_dir", str(workspace / output), *options]
    return forked(exec, RUNNER, {"arguments": arguments})


def wait(process: ForkServerProcess) -> int | None:
    process.join(LIMIT)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("base", release_but(("flux",), ["flux", "diffusion"]), indirect=True)
def test_killed_runs_end_with_the_same_bits(workspace: Path) -> None:
    assert wait(start(workspace, "whole")) == 0
    killed = 0
    # Killed before the first checkpoint, between an evaluation and the checkpoint after it, and after a checkpoint.
    for name, count in (("metrics", 1), ("evaluations", 3), ("metrics", 5)):
        process = start(workspace, "cut", "--resume", "auto")
        while len(rows(workspace / "cut" / f"{name}.jsonl")) < count and process.is_alive():
            time.sleep(0.005)
        process.kill()
        killed += wait(process) == -signal.SIGKILL
    assert killed == 3
    assert wait(start(workspace, "cut", "--resume", "auto")) == 0

    assert_same_run(workspace / "cut", workspace / "whole")
    assert len(rows(workspace / "cut" / "metrics.jsonl")) == 6


@pytest.mark.release
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_twenty_signals_at_random_moments(workspace: Path, base: Path, number: signal.Signals) -> None:
    assert wait(start(workspace, "whole")) == 0
    moments, hits, runs = random.Random(number), 0, 0
    while hits < 20:
        run = workspace / f"cut{runs}"
        process, until = start(workspace, run.name, "--resume", "auto"), written(run) + moments.randrange(4)
        while written(run) < until and process.is_alive():
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)
        code = wait(process)
        # A process that has not come to its handlers yet ends by the signal itself.
        assert code in (0, -number, 128 + number), code
        hits += code != 0
        if code == 0 or hits == 20:
            assert wait(start(workspace, run.name, "--resume", "auto")) == 0
            assert_same_run(run, workspace / "whole")
            runs += 1
    assert runs < 10


def written(run: Path) -> int:
    """Rows that it has."""
    return sum(len(rows(run / name)) for name in ("metrics.jsonl", "evaluations.jsonl"))


def test_a_folder_is_one_runs(workspace: Path) -> None:
    """Two runs in a folder would drop each other's rows; a killed one keeps nobody out."""
    root = workspace / "run"
    holder = forked(exec, HOLDER, {"root": str(root)})
    while not (root / "claimed").exists() and holder.is_alive():
        time.sleep(0.05)
    who = rf"process {holder.pid} on {socket.gethostname()}, since 20..-..-.. ..:..:..\+00:00"
    for resume in (None, "auto"):
        with pytest.raises(ValueError, match=rf"output_dir: got .*run, where a run is going on: {who}$"):
            Trainer(make_recipe(workspace / "base", root), resume)
    holder.kill()
    holder.join()
    assert RunDirectory(root).claim() is None
    assert RunDirectory(root).claim() is None
