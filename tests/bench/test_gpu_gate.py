"""The GPU gate without a GPU: its script, its clock, and what lies on disk whenever it is ended."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as program
from bench.gpu import modules, stages
from bench.gpu.gate import SUMMARY, TESTS, Gate, Summary
from bench.gpu.process import Runner
from bench.rows import read

from ..processes import LIMIT
from .cases import by_itself, run_pytest

ROOT = Path(__file__).parents[2]
BUILT = sorted((ROOT / "dancegrpo_fast").glob(f"_c*{modules.SUFFIX}"))
needs_modules = pytest.mark.skipif(not BUILT, reason="no compiled modules in the source folder")


def started(out: Path, *options: str) -> "subprocess.Popen[str]":
    environment = {**by_itself(), "OUT": str(out), "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    command = [str(ROOT / "bench" / "gpu_gate.sh"), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gate(out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    process = started(out, *options)
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / SUMMARY).read_text())
    return found


def verdicts(out: Path) -> dict[str, str]:
    return {name: stage["verdict"] for name, stage in summary(out)["stages"].items()}


def rows_of(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("gpu-dry-*.jsonl")
    return read(path)


def results() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (ROOT / "bench" / "results").rglob("*") if path.is_file()}


@needs_modules
@pytest.mark.release
@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
def test_a_dry_run_of_the_script(tmp_path: Path) -> None:
    """Every stage, with modules and a package that were brought along; nothing in the repository changes."""
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("brought/__init__.py", "")
    for module in BUILT:
        shutil.copy2(module, wheels / module.name)
    before = results()
    found = gate(out, "--dry", "--wheels", str(wheels), "--prebuilt", str(wheels))
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert verdicts(out) == dict.fromkeys(stages.STAGES, "passed") and summary(out)["finished"]
    assert "packages: brought-1.0-py3-none-any.whl" in found.stdout and "brought along: _cpu" in found.stdout
    # The smoke's lines come first and are there as they were printed.
    assert re.search(r"=== smoke\n.*^good cuda: step, .*=== tests", found.stdout, re.MULTILINE | re.DOTALL)
    rows = rows_of(out)
    assert all(row["environment"]["dry"] for row in rows)
    ops = {row["op"] for row in rows}
    assert {"smoke", "scalar order", "host", "log_prob", "attention memory"} < ops
    assert any("pass" in row for row in rows)
    assert {row["backend"] for row in rows if row["op"] == "log_prob"} == {
        "eager",
        "compile",
        "ours, cuda",
        "ours, triton",
    }
    assert {line["outcome"] for line in read(out / TESTS)} == {"passed"}
    assert results() == before


@needs_modules
@pytest.mark.release
def test_a_dry_run_of_the_timings(tmp_path: Path) -> None:
    """Stages that pytest-benchmark measures in, whose rows the gate judges."""
    found = gate(tmp_path, "--dry", "--only", "modules,bench,ragged")
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert verdicts(tmp_path) == dict.fromkeys(("modules", "bench", "ragged"), "passed")
    assert {row["op"] for row in rows_of(tmp_path)} == {"host", "log_prob", "ragged"}


@needs_modules
@pytest.mark.release
def test_a_gate_that_is_killed_leaves_what_it_found(tmp_path: Path) -> None:
    """And its programs end with it; a second run does what is left, and no more."""
    process = started(tmp_path, "--dry", "--only", "modules,bench,ncu")
    ends = time.monotonic() + LIMIT
    while not any(tmp_path.glob("*.jsonl")) or not any(row["op"] == "host" for row in rows_of(tmp_path)):
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert verdicts(tmp_path) == {"modules": "passed", "bench": "running", "ncu": "not reached"}
    assert not summary(tmp_path)["finished"]
    tree = f"gpu-gate-{process.pid}-"
    while any(tree in os.readlink(link) for link in working_folders()):
        assert time.monotonic() < ends, "its programs go on"
        time.sleep(0.05)
    before = rows_of(tmp_path)
    assert {row["op"] for row in before} == {"host"}, "its programs went on"
    second = tmp_path / "second"
    found = gate(second, "--dry", "--only", "failed", "--last", str(tmp_path))
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert verdicts(second) == dict.fromkeys(("modules", "bench", "ncu", "ragged", "more"), "passed")
    hosts = [row for row in rows_of(second) if row["op"] == "host"]
    # What was measured stays, and is not measured again.
    assert hosts[: len(before)] == before and len({row["backend"] for row in hosts}) == len(hosts) > len(before)
    assert "log_prob" in {row["op"] for row in rows_of(second)}
    assert not list((ROOT / "build").glob(f"{tree}*"))


def working_folders() -> list[str]:
    """Links to those of this user's processes."""
    found = []
    for process in Path("/proc").iterdir():
        link = process / "cwd"
        try:
            os.readlink(link)
        except OSError:
            continue
        found.append(str(link))
    return found


@needs_modules
@pytest.mark.release
def test_a_gate_that_is_ended_says_how_far_it_came(tmp_path: Path) -> None:
    process = started(tmp_path, "--dry", "--only", "modules,smoke")
    ends = time.monotonic() + LIMIT
    while not (tmp_path / SUMMARY).exists() or verdicts(tmp_path)["modules"] != "passed":
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0 and "files in" in stdout
    assert verdicts(tmp_path)["modules"] == "passed" and not summary(tmp_path)["finished"]


def test_no_stage_costs_another_its_result(tmp_path: Path) -> None:
    """There is no time for the commands of any stage, and each says so."""
    runner = Runner(tmp_path, tmp_path / "log", time.monotonic())
    found = Summary(tmp_path, {}, ["smoke", "tests"])
    program.run_all(Gate(tmp_path, tmp_path, tmp_path / "rows", True, 1, runner), found, {"smoke": 9.0, "tests": 9.0})
    assert verdicts(tmp_path) == {"smoke": "FAILED", "tests": "FAILED"} and summary(tmp_path)["finished"]
    assert all(stage["detail"] == "no time was left" for stage in summary(tmp_path)["stages"].values())


def test_what_measures_may_be_missing(tmp_path: Path) -> None:
    """A stage that cannot measure is skipped, and says what to bring."""
    bare = Gate(tmp_path, tmp_path, tmp_path / "rows", True, 1, Runner(tmp_path, tmp_path / "log", time.monotonic()))
    for run, absent in ((stages.bench, "pytest_benchmark"), (stages.blocks, "pytest_benchmark, diffusers")):
        verdict, said = run(bare)
        assert verdict == "skipped" and said.startswith(f"{absent}: not installed") and "--wheels" in said
    assert stages.memory(bare)[1].startswith("diffusers: not installed")


def test_unknown_stages_and_folders_are_refused(tmp_path: Path) -> None:
    found = gate(tmp_path, "--only", "bild")
    assert found.returncode == 2 and "got bild, want failed or some of modules, smoke" in found.stderr
    found = gate(tmp_path, "--prebuilt", str(tmp_path / "none"))
    assert found.returncode == 2 and "want a folder" in found.stderr
    found = gate(tmp_path, "--dry", "--only", "failed")
    assert found.returncode == 1 and f"got no {SUMMARY} in {tmp_path}" in found.stderr


@pytest.mark.parametrize("prebuilt", [True, False])
def test_the_stages_are_over_in_eight_minutes(prebuilt: bool) -> None:
    """Whether modules are brought along or built; a second run in three."""
    limits = {name: stage.prebuilt if prebuilt else stage.built for name, stage in stages.STAGES.items()}
    assert sum(limits.values()) <= stages.SECONDS == 480
    assert stages.seconds_of(list(stages.STAGES), prebuilt, 480.0) == limits
    most = stages.seconds_of([*stages.STAGES, *stages.LATER], prebuilt, stages.SECONDS_AGAIN)
    assert sum(most.values()) == pytest.approx(stages.SECONDS_AGAIN) and stages.SECONDS_AGAIN == 180


def test_modules_of_another_python_are_refused_by_name(tmp_path: Path) -> None:
    for name in modules.NAMES:
        (tmp_path / f"{name}.cpython-39-x86_64-linux-gnu.so").touch()
    (tmp_path / f"_cuda{modules.SUFFIX}").touch()
    refused = modules.misnamed(tmp_path)
    assert len(refused) == len(modules.NAMES) - 1
    assert refused[0] == f"_cpu: got _cpu.cpython-39-x86_64-linux-gnu.so, want _cpu{modules.SUFFIX}"
    (tmp_path / f"_cuda{modules.SUFFIX}").unlink()
    assert modules.misnamed(tmp_path)[-1].startswith("_cuda: got _cuda.cpython-39")


def test_modules_of_other_sources_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("csrc/a.cpp", "kernels/b/c.cuh", "kernels/b/d.py", "CMakeLists.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    folder = tmp_path / "modules"
    folder.mkdir()
    assert modules.outdated(folder, tmp_path) == []
    (folder / modules.SOURCES_FILE).write_text(modules.fingerprint(tmp_path) + "\n")
    assert modules.outdated(folder, tmp_path) == []
    (tmp_path / "kernels/b/d.py").write_text("no compiler's")
    assert modules.outdated(folder, tmp_path) == []
    for name in ("csrc/a.cpp", "kernels/b/c.cuh", "CMakeLists.txt"):
        (tmp_path / name).write_text("changed")
        (refused,) = modules.outdated(folder, tmp_path)
        assert refused.startswith(f"{modules.SOURCES_FILE}: got modules of other sources")
        (folder / modules.SOURCES_FILE).write_text(modules.fingerprint(tmp_path))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ({"columns": 9, "architectures": "80,90"}, []),
        ({"columns": 9, "architectures": "80,100"}, ["_cuda: got architectures 80,100, want 90 among them"]),
        ({"columns": 8, "architectures": "90"}, ["_cuda: got table_columns 8, want 9"]),
        ({"error": "GLIBC_9"}, ["_cuda: got a module that does not load (GLIBC_9), want one built for here"]),
    ],
)
def test_modules_of_another_version_are_refused_by_name(module: dict[str, Any], said: list[str]) -> None:
    good = {"columns": 9, "architectures": ""}
    assert modules.unfit({"columns": 9, "modules": {"_cpu": good, "_cuda": module}}, "90") == said


@needs_modules
def test_a_module_that_does_not_load_is_refused_by_name(tmp_path: Path) -> None:
    folder, out = tmp_path / "modules", tmp_path / "out"
    folder.mkdir()
    for module in BUILT:
        shutil.copy2(module, folder / module.name)
    (folder / f"_cuda{modules.SUFFIX}").write_text("no library")
    found = gate(out, "--dry", "--only", "modules", "--prebuilt", str(folder))
    assert found.returncode == 1 and verdicts(out) == {"modules": "FAILED"}
    assert "refused of those brought along: _cuda: got a module that does not load" in found.stdout


PLUGIN = """
import os, signal, pytest

@pytest.fixture
def broken(): raise ValueError("in a fixture")

def test_one(record_property): record_property("number", 3)
def test_two(): assert False, "why"
@pytest.mark.skip(reason="later")
def test_three(): pass
def test_four(broken): pass
def test_five(): os.kill(os.getpid(), signal.SIGKILL)
"""


def test_tests_that_are_killed_leave_their_lines(tmp_path: Path) -> None:
    """Of each test before; those that passed are not run again."""
    (tmp_path / "test_some.py").write_text(PLUGIN)
    killed, _ = run_pytest(tmp_path, folder=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    found = {line["test"].partition("::")[2]: line for line in read(tmp_path / "lines")}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "test_one": "passed",
        "test_two": "failed",
        "test_three": "skipped",
        "test_four": "failed",
    }
    assert found["test_one"]["properties"] == [["number", 3]] and "why" in found["test_two"]["reason"]
    assert "in a fixture" in found["test_four"]["reason"]
    again, _ = run_pytest(tmp_path, "--not-again", "lines", "--collect-only", folder=tmp_path)
    assert re.findall(r"::(\w+)$", again.stdout, re.MULTILINE) == ["test_two", "test_three", "test_four", "test_five"]
