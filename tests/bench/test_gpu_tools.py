"""What the gate makes of NVIDIA's tools: programs in their place that print what they would."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import expectations, tools
from bench.gpu.gate import Gate
from bench.gpu.process import Runner
from bench.rows import read

ROOT = Path(__file__).parents[2]
CALLED = "".join(f"called: {part}\n" for part in expectations.PARTS)
EVERYTHING = f"{CALLED}every call was made\n"
CLEAN = "========= ERROR SUMMARY: 0 errors\n"


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    runner = Runner(tmp_path, tmp_path / "log", time.monotonic() + 60, time.monotonic() + 3)
    runner.log.write_text("")
    return Gate(tmp_path, tmp_path, tmp_path / "rows.jsonl", False, 1, runner)


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Every tool is this shell script."""
    path = tmp_path / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(tools, "tool", lambda name: str(path))


def prints(text: str, status: int) -> str:
    return f"cat <<'end'\n{text}\nend\nexit {status}"


def refuses(*options: str) -> str:
    """As the real one: the option's name, then all of its help."""
    found = " ".join(f'case "$*" in *{o}*) echo "unrecognised option \'{o}\'"; exit 1;; esac;' for o in options)
    return f"{found} {prints(EVERYTHING + CLEAN, 0)}"


RACE, HAZARDS = "Race reported between Write access", "RACECHECK SUMMARY: 3 hazards"
SAID = {
    "clean": (prints(EVERYTHING + CLEAN, 0), "passed|clean for cuda, triton, block ops, all shapes", [True] * 3),
    "some shapes": (prints(f"{CALLED}out of time\n{CLEAN}", 0), "passed|clean for cuda, triton, block", [True] * 3),
    "some ops": (prints("called: cuda\n" + CLEAN, 0), "FAILED|clean for cuda; out of time for the others", [True]),
    "an error": (prints("called: cuda\nInvalid __global__", 86), "FAILED|errors were found, while cuda", [False]),
    "no such device": (prints("Device not supported", 1), "skipped|it does not work on this device", []),
    "no verdict": (prints("nothing", 0), "FAILED|no verdict: nothing; called: nothing", []),
    "no summary": (prints(CALLED, 0), "FAILED|no verdict: called: block ops; called: cuda, triton, block ops", []),
    "a race": (prints(CALLED + RACE, 0), "FAILED|errors were found", [False] * 3),
    "hazards": (prints(CALLED + HAZARDS, 0), "FAILED|errors were found", [False] * 3),
    "slow": ("echo called: cuda; sleep 30", "FAILED|no verdict: out of time; called: cuda", []),
    "an old version": (refuses("--kernel-name"), "passed|clean for", [True] * 3),
    "a new version": (refuses("--kernel-regex"), "passed|clean for", [True] * 3),
    "no known version": (refuses("--kernel-name", "--kernel-regex"), "FAILED|no verdict: it refuses", []),
}


@pytest.mark.parametrize(("script", "wanted", "clean"), SAID.values(), ids=SAID)
def test_what_a_sanitizer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate, script: str, wanted: str, clean: list[bool]
) -> None:
    program(tmp_path, monkeypatch, script)
    assert "|".join(tools.memcheck(gate)).startswith(wanted)
    rows = read(gate.rows)
    assert [row["clean"] for row in rows] == clean
    verdicts = expectations.JUDGES["memcheck"](expectations.Evidence(rows, [], []))
    assert [verdict.met for verdict in verdicts] == (clean + [False] * 3)[:3]
    assert not any(v.met for v in expectations.JUDGES["racecheck"](expectations.Evidence(rows, [], [])))


def test_no_sanitizer(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "tool", lambda name: None)
    assert tools.racecheck(gate) == ("skipped", "compute-sanitizer is not installed")


def test_every_kernel_of_ours_is_watched() -> None:
    names = []
    for path in sorted((ROOT / "kernels").rglob("*")):
        if path.suffix == ".py":
            names += re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
        elif path.suffix == ".cuh":
            # Every one of them lies in the namespace.
            names += [
                f"dgf{name}" for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", path.read_text(), re.DOTALL)
            ]
    assert len(names) > 12
    assert [name for name in names if not any(known in name for known in tools.NAMES)] == []


STEP = "void dgf::transition_sample_kernel<float>(dgf::TransitionCall)"
NCU = f"""==PROF== Connected to process 1
==PROF== Profiling "transition_sample_kernel": 0%
the program ended
==PROF== Disconnected from process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","{STEP}","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","77.5"
"0","1","{STEP}","dram__bytes.sum","byte","1,234"
"0","1","{STEP}","other","%","1"
"1","1","forward_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","40"
"""


def test_what_ncu_prints_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    program(tmp_path, monkeypatch, prints(NCU, 0))
    assert tools.ncu(gate) == ("passed", "3 values")
    rows: list[dict[str, Any]] = read(gate.rows)
    assert [row["value"] for row in rows] == [77.5, 1234.0, 40.0]
    assert rows[0]["kernel"] == "void dgf::transition_sample_kernel<float>"
    verdicts = expectations.JUDGES["ncu"](expectations.Evidence(rows, [], []))
    assert [verdict.met for verdict in verdicts] == [True, False, False]
    assert "40 %" in verdicts[2].text and "was not profiled" in verdicts[1].text


def test_ncu_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    program(tmp_path, monkeypatch, prints("==ERROR== LibraryNotLoaded", 1))
    assert tools.ncu(gate) == ("FAILED", "no values: ==ERROR== LibraryNotLoaded")
