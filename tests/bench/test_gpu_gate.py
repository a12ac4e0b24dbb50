"""The GPU gate without a GPU: its script, its clock, what it reads from tools, and what it says of the numbers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from ..processes import LIMIT

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "dancegrpo_fast").glob("_cpu*.so"))


def load(path: str) -> ModuleType:
    """A module of bench/, which is not installed."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / "bench" / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def gate(out: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    command = [str(ROOT / "bench" / "gpu_gate.sh"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)


def assert_block_rows(rows: list[dict]) -> None:
    """Every contender of every HunyuanVideo case, each way, and nothing of ours that is wrong."""
    summary = load("gpu/summary")
    assert {row["model"] for row in rows} == {summary.BLOCK_MODEL}
    found = {(row["op"], row["form"]) for row in rows}
    assert found == {*summary.BLOCK_FORMS, ("blocks", "double, single")}
    for form in found:
        mine = [row for row in rows if (row["op"], row["form"]) == form]
        names = {"eager", "compile", "ours, lossless", "ours, fast"}
        if form[0] == "blocks":
            assert all("no mask" in row["attention"] and "peak_bytes" in row for row in mine)
            names = {"eager", "compile", *(f"patched, {how}" for how in ("lossless", "fast", "fast, recompute all"))}
        pairs = [(row["backend"], row["pass"]) for row in mine]
        assert sorted(pairs) == sorted((name, p) for name in names for p in ("forward", "forward + backward"))
        ours = [row for row in mine if row["backend"].startswith(("ours", "patched"))]
        assert all(row["within_budget"] and row["source"] == "measured" for row in ours)


def assert_memory_rows(rows: list[dict]) -> None:
    """Every model with and without block ops; on a CPU what is traced is what runs, and one backend attends."""
    models = [row for row in rows if row["op"] == "memory"]
    assert len({row["model"] for row in models}) == 3
    assert {row["policy"] for row in models} == {"none", "full"}
    assert all(row["saved_off"] == 0 and row["measured_peak_bytes"] > row["measured_saved_bytes"] for row in models)
    assert all(row["peak_off"] == 0 for row in models if row["patch"] == "off")
    backends = [row for row in rows if row["op"] == "attention memory"]
    assert {(row["attention"], row["masked"]) for row in backends if row["runs"]} >= {
        ("native", False),
        ("native", True),
    }
    assert all(row["kernels"] if row["runs"] else row["error"] for row in backends)
    lines = load("gpu/summary").memory_lines(rows)
    assert len(lines) == 2 * len(models)


@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
@pytest.mark.skipif(not MODULES, reason="no compiled modules in the source folder")
def test_a_dry_run_of_the_script(tmp_path: Path) -> None:
    found = gate(tmp_path, "--dry", "--only", "environment,bench,blocks,memory,expectations,memcheck,ncu")
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert len(re.findall(r"^passed ", found.stdout, re.MULTILINE)) == 7
    (rows,) = tmp_path.glob("gpu-dry-*.jsonl")
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    assert all(row["environment"]["dry"] for row in read)
    assert_block_rows([row for row in read if "pass" in row])
    assert {row["op"] for row in read if "pass" not in row} == {
        "host",
        "log_prob",
        "launches",
        "memory",
        "attention memory",
    }
    assert_memory_rows(read)
    assert {row["backend"] for row in read if row["op"] == "log_prob"} == {
        "eager",
        "compile",
        "ours, cuda",
        "ours, triton",
    }
    assert (tmp_path / "gpu-gate.log").stat().st_size > 1000
    assert not (ROOT / "bench" / "results" / rows.name).exists()


def test_one_stage_failing_keeps_the_others(tmp_path: Path) -> None:
    """There is no time for the commands of any stage, and each says so."""
    found = gate(tmp_path, "--dry", "--only", "environment,expectations", "--seconds", "1")
    assert found.returncode == 1
    assert len(re.findall(r"^FAILED .*no time was left", found.stdout, re.MULTILINE)) == 2
    assert "files in" in found.stdout


def test_unknown_stages_are_refused(tmp_path: Path) -> None:
    found = gate(tmp_path, "--only", "bild")
    assert found.returncode == 2 and "got bild, want some of build" in found.stderr


class FakeCuda:
    """A device whose calls take `work` seconds after a wait; its queue holds `room` of them."""

    RATE = 1e9

    def __init__(self, work: float, room: int) -> None:
        self.work, self.room = work, room
        self.now = 0.0  # of the device, while the host takes no time
        self.queued, self.asleep, self.sleeps = 0, False, 0

    def Event(self, enable_timing: bool) -> "FakeEvent":  # noqa: N802  # torch's name
        return FakeEvent(self)

    def _sleep(self, cycles: int) -> None:
        self.now += cycles / self.RATE
        self.asleep = cycles > 0
        self.queued = 0
        self.sleeps += 1

    def synchronize(self) -> None:
        self.queued = 0

    def launch(self) -> None:
        self.now += self.work
        self.queued += 1


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, 0.0

    def record(self) -> None:
        self.at = self.cuda.now

    def query(self) -> bool:
        """Passed, where nothing held the device up, or where a full queue held the host up until it went on."""
        return not self.cuda.asleep or self.cuda.queued > self.cuda.room

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.at - self.at)


def run_on(cuda: FakeCuda) -> Callable[[int], object]:
    def run(call: int) -> object:
        cuda.launch()
        return object()

    return run


def test_the_device_clock_measures_the_device() -> None:
    cuda = FakeCuda(work=3e-6, room=1000)
    clock = load("clocks").DeviceClock(5, cuda)
    run = run_on(cuda)
    assert clock.cycles_per_s == pytest.approx(cuda.RATE)
    assert clock.calls_for(run, 0.03) == clock.MAX_CALLS
    assert clock.calls_for(run, 10e-6) == 3
    sample = clock.time(run, 0, 8)
    assert sample.work == pytest.approx(cuda.work) and sample.host > 0.0
    # Results stay alive for as long as the inputs take to come round.
    assert len(clock.kept) == 5 and len(set(map(id, clock.kept))) == 5


def test_the_device_clock_never_fills_the_queue() -> None:
    cuda = FakeCuda(work=3e-6, room=10)
    clock = load("clocks").DeviceClock(2, cuda)
    run = run_on(cuda)
    assert clock.calls_for(run, 0.03) == 8
    assert clock.time(run, 0, 8).work == pytest.approx(cuda.work)
    with pytest.raises(RuntimeError, match="11 calls were not queued"):
        clock.time(run, 0, 11)


def speed(op: str, backend: str, **numbers: float) -> dict:
    shape = {"batch": 8, "elements": 806_400, "output_dtype": "float32"}
    return {
        "op": op,
        "backend": backend,
        **shape,
        "copy_share": 0.85,
        "times_eager": 12.0,
        "times_compile": 1.4,
    } | numbers


def test_expectations() -> None:
    summary = load("gpu/summary")
    lines = summary.transition_lines
    launches = {"op": "launches", "backend": summary.STEP, "kernels": 1, "memory_operations": 0, "waits": False}
    host = [{"op": "host", "backend": name, "us_median": 7.5} for name in (summary.STEP, summary.OP)]
    good = [launches, *host, speed("step", "ours, cuda"), speed("policy_loss", "ours, cuda")]
    assert [line for line in lines(good) if line.startswith(summary.MISSED)] == []
    assert len(lines(good)) == 10
    for bad, said in (
        ([{**launches, "kernels": 2}, *good[1:]], "starts 2 kernels"),
        ([{**launches, "waits": True}, *good[1:]], "a step waits"),
        ([*good, speed("log_prob", "ours, cuda", copy_share=0.79)], "79% of copy bandwidth"),
        ([*good, speed("log_prob", "ours, cuda", times_compile=1.2)], "1.20 x compile"),
        ([launches, {**host[0], "us_median": 9.0}, *good[2:]], "9.0 us"),
        (good[3:], "not counted"),
        (good[:3], "8 x 806,400 was not measured"),
    ):
        missed = [line for line in lines(bad) if line.startswith(summary.MISSED)]
        assert any(said in line for line in missed), missed
    # Rows of Triton and of blocks are expected of nothing here.
    assert lines([*good, *block_rows(summary)]) == lines(good)
    assert lines([*good, speed("step", "ours, triton", copy_share=0.1)]) == lines(good)


def block_rows(summary: ModuleType) -> list[dict]:
    """A run that meets everything."""
    passes, shared = ("forward", "forward + backward"), {"model": summary.BLOCK_MODEL, "batch": 1}
    numbers = {"copy_share": 0.75, "times_eager": 2.0, "times_compile": 0.95}
    rows = [
        {"op": op, "form": form, "backend": "ours, fast", "pass": p, **shared, **numbers}
        for op, form in summary.BLOCK_FORMS
        for p in passes
    ]
    peaks = {"eager": 9, "compile": 7, "patched, lossless": 6, "patched, fast": 5, "patched, fast, compile": 8}
    block = {"op": "blocks", "form": "double, single", **shared}
    return [
        *rows,
        *(
            {**block, "backend": name, "pass": p, "peak_bytes": peak << 30}
            for name, peak in peaks.items()
            for p in passes
        ),
    ]


def test_expectations_of_blocks() -> None:
    summary = load("gpu/summary")
    good = block_rows(summary)
    assert len(summary.block_lines(good)) == 2 * 3 * 7 + 2
    assert [line for line in summary.block_lines(good) if line.startswith(summary.MISSED)] == []
    fast = next(i for i, row in enumerate(good) if row["backend"] == "patched, fast" and "backward" in row["pass"])
    for place, change, said in (
        (0, {"copy_share": 0.69}, "norm_modulate, 3 consumers, forward: 69% of copy bandwidth"),
        (0, {"times_eager": 0.98}, "0.98 x eager"),
        (0, {"times_compile": 0.89}, "0.89 x compile"),
        (0, {"model": "FLUX.1-dev"}, ""),
        (fast, {"peak_bytes": 8 << 30}, "patched, fast: peak 8.00 GiB, expected below eager's 9.00 and compile's 7.00"),
    ):
        rows = [*good[:place], {**good[place], **change}, *good[place + 1 :]]
        missed = [line for line in summary.block_lines(rows) if line.startswith(summary.MISSED)]
        assert any(said in line for line in missed) if said else missed == []
    assert all("not measured" in line for line in summary.block_lines([])) and len(summary.block_lines([])) == 8


def test_expectations_of_memory() -> None:
    summary = load("gpu/summary")
    row = {"op": "memory", "model": "FLUX", "attention": "flash", "policy": "full", "patch": "off"}
    off = summary.MEMORY_OFF
    for peak, saved, missed in ((0.0, -off, 0), (2 * off, off, 1), (-2 * off, None, 2)):
        lines = summary.memory_lines([{**row, "peak_off": peak, "saved_off": saved}, {"op": "host"}])
        assert len(lines) == 2 and sum(line.startswith(summary.MISSED) for line in lines) == missed
    assert summary.memory_lines([]) == [f"{summary.MISSED} predicted memory was not measured"]


JUDGE = """
import json, sys, time
from pathlib import Path
from bench.gpu import stages
from bench.gpu.process import Runner
out, asked = Path(sys.argv[1]), tuple(sys.argv[2].split(","))
(out / "rows").write_text(json.dumps({"op": "host", "backend": "eager", "us_median": 1.0}))
runner = Runner(out, out / "log", time.monotonic() + 60)
print("|".join(stages.expectations(stages.Gate(out, out, out / "rows", False, "90", 1, runner, asked))))
"""


@pytest.mark.parametrize(
    ("asked", "count"), [("bench", 3), ("blocks", 8), ("bench,blocks", 11), ("memory", 1), ("expectations", 12)]
)
def test_only_what_a_run_measures_is_judged(tmp_path: Path, asked: str, count: int) -> None:
    command = [sys.executable, "-c", JUDGE, str(tmp_path), asked]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT)
    assert found.stdout.splitlines()[-1] == f"FAILED|0 of {count} met"


NCU = """==PROF== Connected to process 1
==PROF== Profiling "transition_sample_kernel": 0%
every op was called
==PROF== Disconnected from process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","void dgf::transition_sample_kernel<float>(dgf::TransitionCall)","dram__bytes.sum","Mbyte","77.5"
"0","1","void dgf::transition_sample_kernel<float>(dgf::TransitionCall)","other","%","1"
"""


def test_what_ncu_prints_is_read() -> None:
    run = "from bench.gpu.stages import profiled; import sys; print(*profiled(sys.stdin.read()), sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", run], input=NCU, cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT
    )
    assert found.stdout.strip() == "void dgf::transition_sample_kernel<float>: dram__bytes.sum 77.5 Mbyte"


SANITIZE = """
import sys, time
from pathlib import Path
from bench.gpu import stages
from bench.gpu.process import Runner
out, program = Path(sys.argv[1]), sys.argv[2]
stages._tool = lambda name: program
runner = Runner(out, out / "log", time.monotonic() + 60, time.monotonic() + 3)
gate = stages.Gate(out, out, out / "rows", False, "90", 1, runner)
print("|".join(stages.memcheck(gate)))
"""


@pytest.mark.parametrize(
    ("prints", "status", "wanted"),
    [
        ("every op was called\n========= ERROR SUMMARY: 0 errors", 0, "passed|clean for cuda, triton, block ops"),
        ("========= Invalid __global__ read of size 4 bytes", 86, "FAILED|exit status 86"),
        ("========= Error: Device not supported", 1, "skipped|nothing checked; cuda: does not work here"),
        ("nothing that it would say", 0, "skipped|cuda: no verdict"),
        ("$(sleep 30)", 0, "skipped|nothing checked; cuda: does not work here: out of time"),
    ],
    ids=["clean", "an error", "no such device", "no verdict", "slow"],
)
def test_what_a_sanitizer_says(tmp_path: Path, prints: str, status: int, wanted: str) -> None:
    """By a program in its place."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "{prints}"\nexit {status}\n')
    program.chmod(0o755)
    command = [sys.executable, "-c", SANITIZE, str(tmp_path), str(program)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT)
    assert found.stdout.splitlines()[-1].startswith(wanted), found.stdout
