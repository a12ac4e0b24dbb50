"""The adapter to pytest-benchmark: turns, verified first, times of our clocks, and what lies on disk."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.clocks import Sample
from bench.rows import add, drop, grid, read
from bench.turns import interleave

from .cases import Done, run_pytest

CASES = '''
import torch
from bench.clocks import Sample
from bench.turns import Contest, cross

SECONDS = {"eager": 4.0, "compile": 2.0, "ours": 1.0, "slow": 8.0}
NAMES = ["eager", "compile", "ours", "slow", "wrong", "broken", "maybe"]

class Clock:
    """Times are told, not taken: later rounds take a little longer."""
    def calls_for(self, run, budget_s): return 3
    def time(self, run, first, count):
        told = run(first)
        return Sample(3.0, None) if isinstance(told, torch.Tensor) else Sample(told + first / 100, 5e-6)

def pytest_generate_tests(metafunc): cross(metafunc, ["a", "b"], NAMES)

def check(name):
    assert name != "wrong", "3 bits"
    assert name != "compile", "2 bits"
    if name in ("broken", "maybe"): raise ValueError("no kernel")

def test_op(case, contest):
    made = lambda: Contest(
        {name: lambda i, name=name: SECONDS[name] for name in NAMES}, check, lambda name: {"op": "op"},
        Clock(), lambda name: (12_000_000_000, None), sets=4, may_fail=("maybe",)
    )
    contest(made)
'''


class Recorder:
    """A clock that notes whose turn it is."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    def calls_for(self, run: Any, budget_s: float) -> int:
        return 2

    def time(self, run: Any, first: int, count: int) -> Sample:
        self.turns.append(run(first))
        return Sample(float(len(self.turns)))


def test_contenders_take_turns() -> None:
    """Another one begins every round, and the first round is thrown away."""
    clock = Recorder()
    samples, counts = interleave({name: lambda i, name=name: name for name in "abc"}, clock, 3, 0.0)
    assert "".join(clock.turns) == "abcbcacababc" and counts == dict.fromkeys("abc", 2)
    assert [s.work for s in samples["a"]] == [6.0, 8.0, 10.0] and len(samples["c"]) == 3
    # At least so many rounds, and more while there is time.
    clock = Recorder()
    interleave({"a": lambda i: "a"}, clock, 3, 0.05)
    assert len(clock.turns) > 4


def run(folder: Path, *options: str) -> tuple[Done, list[dict[str, Any]]]:
    shared = [
        "--benchmark-min-rounds",
        "3",
        "--benchmark-max-time",
        "0",
        "--benchmark-storage",
        f"file://{folder}/saved",
    ]
    shared += ["-p", "bench.conftest", "--device", "dry", "bench_made_up.py"]
    return run_pytest(folder, *shared, *options, folder=folder)


Measured = tuple[Path, Done]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("cases")
    (folder / "bench_made_up.py").write_text(CASES)
    return folder, run(folder, "--benchmark-save", "one")[0]


def test_what_is_right_is_measured(measured: Measured) -> None:
    """Our clock's times are pytest-benchmark's; ours that are off are not measured, a peer that is off is marked."""
    folder, done = measured
    assert done.returncode == 1
    for said in ("not measured: 3 bits", "not measured: ValueError: no kernel", "4 failed, 8 passed, 2 skipped"):
        assert said in done.stdout, done.stdout
    assert "4 timings of ours: 0.504 to 3.83 (median 2.17) x eager; 2 slower" in done.stdout
    assert "slower than compile: op a, slow (0.26)" in done.stdout and "off budget: op b, compile" in done.stdout
    (saved,) = (folder / "saved").rglob("*_one.json")
    found = json.loads(saved.read_text())["benchmarks"]
    assert {each["group"] for each in found} == {"op a", "op b"} and len(found) == 8
    (ours,) = [each for each in found if each["name"] == "test_op[a-ours]"]
    # Of four rounds of three calls the first is thrown away.
    assert ours["stats"]["rounds"] == 3 and ours["stats"]["median"] == pytest.approx(1.06)
    info = ours["extra_info"]
    assert info["within_budget"] and info["times_eager"] == pytest.approx(4.06 / 1.06)
    assert info["host_us_median"] == pytest.approx(5.0) and info["calls_per_round"] == 3 and info["input_sets"] == 4
    assert info["bytes_minimum"] == 12_000_000_000 and info["bytes_moved"] is None
    assert info["copy_share"] == pytest.approx(info["gb_per_s"] / info["copy_gb_per_s"])
    assert info["environment"]["dry"] and {"threads", "torch", "git"} <= set(info["environment"])


def test_rows_lie_on_disk(measured: Measured) -> None:
    """One for each that was measured, one line a test; a later run leaves those out, and starts nothing too late."""
    folder, _ = measured
    rows = read(folder / "rows")
    assert [(row["case"], row["backend"]) for row in rows] == [
        (f"op {case}", name) for case in "ab" for name in ("eager", "compile", "ours", "slow")
    ]
    assert rows[2]["us_median"] == pytest.approx(1.06e6) and rows[2]["rounds"] == 3
    assert [line["outcome"] for line in read(folder / "lines")].count("passed") == 8
    done, again = run(folder, "--not-again", "lines", "--seconds", "0")
    assert "6 skipped" in done.stdout and again == rows
    assert "out of time" in read(folder / "lines")[-1]["reason"]


@pytest.mark.release
def test_two_runs_are_compared(measured: Measured) -> None:
    folder, _ = measured
    done, _ = run(folder, "-k", "ours", "--benchmark-compare")
    assert "Comparing against benchmarks from" in done.stderr + done.stdout
    assert "test_op[a-ours] (NOW)" in done.stdout and "test_op[a-ours] (0001_one)" in done.stdout, done.stdout


@pytest.mark.release
def test_a_case_is_compiled_ahead_once(measured: Measured) -> None:
    """All of its contenders are called, and none is verified or timed."""
    folder, _ = measured
    (folder / "bench_made_up.py").write_text(
        CASES.replace("lambda i, name=name: SECONDS[name]", "lambda i, name=name: print('called', name)")
    )
    done, _ = run(folder, "--ahead", "--benchmark-disable", "-s")
    assert done.returncode == 0 and "2 passed" in done.stdout and done.stdout.count("called") == 2 * 7


def test_rows_of_a_file(tmp_path: Path) -> None:
    """A line that was cut off is none, and those of others stay."""
    path = tmp_path / "rows"
    add(None, [{"op": "mine"}])
    drop(path, lambda row: True)
    add(path, [{"op": "mine", "value": 1}, {"op": "other"}])
    with path.open("a") as file:
        file.write('{"op": "mi')
    assert [row["op"] for row in read(path)] == ["mine", "other"]
    drop(path, lambda row: row["op"] == "mine")
    assert read(path) == [{"op": "other"}]
    assert grid(["a", "b"], [(1, None)]) == ["| a | b |", "|---|---|", "| 1 | None |"]
