"""The table at the end of a run, the file beside it, and that neither changes what a script computes."""

import io
import json
import multiprocessing
import random
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dancegrpo_fast.compat import mixgrpo
from dancegrpo_fast.dropin import loading
from dancegrpo_fast.dropin.replaced import Replacements
from dancegrpo_fast.dropin.report import peak_memory, table
from dancegrpo_fast.dropin.settings import Settings

from ..compat.cases import SIGMAS
from .told import AFTER, STEP, Told, V, X, doing, replaced


def test_calls_times_and_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "RECORDS", [])
    told = Told()
    step = told.stand_in(STEP, where="train.py:131")
    for _ in range(5):
        step(V, X, 0.7, SIGMAS, 1, None)
    for index in (1, 2):
        step(V, X, 0.7, SIGMAS, index, AFTER)
    (function,) = told.all.report()["functions"]
    assert function["function"] == "flow_grpo_step" and function["where"] == "train.py:131"
    assert function["by"] == ["dancegrpo_fast.compat.mixgrpo.flow_grpo_step"]
    rollout, replay = function["rollout"], function["replay"]
    assert rollout["calls"] == 5 and replay["calls"] == 2
    assert rollout["microseconds"] > 0 and rollout["microseconds_of_original"] > 0
    # This double reads nothing; replays were too few to count those of ours.
    assert rollout["host_reads_avoided"] == 0 and replay["host_reads_avoided"] is None
    json.dumps(told.all.report())


def test_host_reads_of_the_original_are_avoided() -> None:
    told, step = replaced(doing("float(sigmas[index]); bool(latents.isnan().any())"))
    for _ in range(7):
        step(V, X, 0.7, SIGMAS, 1, AFTER)
    assert told.all.report()["functions"][0]["replay"]["host_reads_avoided"] == 14


def test_timing_changes_nothing() -> None:
    told, step = replaced()
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    states = []
    for call, generator in zip((mixgrpo.flow_grpo_step, step), generators, strict=True):
        torch.manual_seed(3)
        drawn = [call(V, X, 0.7, SIGMAS, index, None) for index in (0, 1, 2, 3, 0, 1)]
        drawn += [call(V, X, 0.7, SIGMAS, index, None, generator) for index in (0, 1, 2)]
        states.append((torch.stack([d[0] for d in drawn]), torch.get_rng_state(), generator.get_state()))
    assert all(map(torch.equal, *states))
    assert told.all.report()["functions"][0]["rollout"]["calls"] == 9


def test_timing_draws_none_of_the_script_s_other_random_numbers() -> None:
    told, step = replaced(doing("import random, numpy; random.random(); numpy.random.rand()"))
    states = random.getstate(), np.random.get_state()[1].tolist()
    for _ in range(4):
        step(V, X, 0.7, SIGMAS, 1, AFTER)
    (function,) = told.all.report()["functions"]
    assert function["replay"]["calls"] == 4 and function["replay"]["microseconds_of_original"] > 0
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_an_original_that_cannot_be_timed() -> None:
    told, step = replaced(doing("if len(latents) == 8: raise MemoryError('full')"))
    for _ in range(5):
        assert len(step(V, X, 0.7, SIGMAS, 1, AFTER)) == 5
    report = told.all.report()
    (function,) = report["functions"]
    assert function["original_not_timed"] == "MemoryError: full"
    assert function["replay"]["microseconds_of_original"] is None and function["replay"]["microseconds"] > 0
    assert "the original flow_grpo_step was not timed: MemoryError: full" in table(report)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"class": "FluxTransformer2DModel", "mode": "lossless", "accepted": True, "reason": ""},
        {"class": "UNet2DConditionModel", "mode": "lossless", "accepted": False, "reason": "no such blocks"},
    ]
    monkeypatch.setattr(loading, "RECORDS", records)
    told = Told()
    step = told.stand_in(STEP, where="train.py:131")
    other = told.stand_in(doing("latents = latents * 2"), where="other.py:7")
    for _ in range(5):
        step(V, X, 0.7, SIGMAS, 1, None)
    for _ in range(3):
        other(V, X, 0.7, SIGMAS, 1, None)
    told.stand_in(doing("pass"), where="imported.py:3")
    told.all.finish()
    lines = [line.strip() for line in told.said[-1].splitlines()[1:]]
    assert lines[0].split("  ")[0] == "function" and "us, original" in lines[0]
    assert lines[1].startswith("train.py:131 flow_grpo_step  rollout      5")
    (kept,) = [line for line in lines if line.startswith("3 calls of the original flow_grpo_step: sampling at the")]
    assert "is off by" in kept
    assert "never called: imported.py:3 flow_grpo_step" in lines
    assert "FluxTransformer2DModel: block ops (lossless)" in lines
    assert "UNet2DConditionModel: as it was: no such blocks" in lines
    assert "the first update was not audited: no replay with a gradient was seen in this process" in lines
    assert lines[-1].startswith("peak memory: ") and lines[-1].endswith("GiB (resident memory of the process)")


def test_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "report.json"
    told = Told(report=str(file), latents="float32")
    told.stand_in(STEP)(V, X, 0.7, SIGMAS, 1, None)
    told.all.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    written = json.loads(file.read_text())
    assert written["functions"] == told.all.report()["functions"] and written["settings"]["latents"] == "float32"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    told.all.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.rank3.json"]


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    told = Told(report=str(tmp_path / "missing" / "report.json"))
    told.stand_in(STEP)(V, X, 0.7, SIGMAS, 1, None)
    told.all.finish()
    assert told.said[-1].startswith("the report is incomplete: FileNotFoundError: ")


def test_nothing_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "RECORDS", [])
    told = Told()
    told.all.finish()
    assert told.said == []
    told.stand_in(STEP)
    told.all.finish()
    assert told.said == ["none of these functions was called in this process: flow_grpo_step"]
    loading.RECORDS.append({"class": "FluxTransformer2DModel", "mode": "fast", "accepted": True, "reason": ""})
    told.all.finish()
    assert "FluxTransformer2DModel: block ops (fast)" in told.said[-1]
    told = Told()
    told.stand_in(STEP)
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    told.all.finish()
    assert told.said == []


class Bare:
    """A stream as scripts write them for their logs."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


@pytest.mark.parametrize("kind", ["none", "closed", "without flush"])
def test_whatever_stderr_is_a_script_goes_on(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed, bare = io.StringIO(), Bare()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"none": None, "closed": closed, "without flush": bare}[kind])
    found = Replacements(Settings())
    assert found.stand_in(STEP, None, "x")(V, X, 0.7, SIGMAS, 1, V)[0] is V
    found.finish()
    assert capsys.readouterr().out == ""
    assert ("x flow_grpo_step -> " in bare.text) == (kind == "without flush")


def test_peak_memory() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert resident < 2 * peak_memory()["bytes"] < 100 * resident  # in bytes, not in kilobytes
