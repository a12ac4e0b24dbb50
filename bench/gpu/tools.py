"""Stages of NVIDIA's tools: memcheck and racecheck of compute-sanitizer, and ncu."""

import csv
import io
import json
import re
import shutil
import sys
import time
from pathlib import Path

from ..rows import Row, add, drop
from .expectations import KERNELS, PARTS
from .gate import FAILED, PASSED, SKIPPED, Gate, Outcome
from .process import last_lines

# Every kernel of ours has one of these in its name; torch's are not watched, which makes them no slower.
NAMES = (
    "dgf",
    *(f"{name}_kernel" for name in ("sample", "log_prob", "gradient", "gradients", "policy_loss", "forward")),
)
NAMES += ("backward_kernel", "sum_chunks_kernel", "sum_kernel")
# The second is what versions before 2023.3 know.
SPELLINGS = ("--kernel-name", "--kernel-regex")
REFUSED = "unrecognised option"
# The program ends itself so many seconds before its limit, so that the verdict is printed.
TO_END = 6.0
CLEAN = re.compile(r"(ERROR|RACECHECK) SUMMARY: 0 (errors|hazards)")
FOUND = re.compile(r"Invalid |Race reported|Misaligned|hazard at|(ERROR|RACECHECK) SUMMARY: [1-9]")


def tool(name: str) -> str | None:
    """Of the CUDA toolkit, on the PATH or where the toolkit puts it."""
    beside = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


def _driver(gate: Gate, *options: str) -> Outcome:
    status, text = gate.python("-m", "bench.gpu.driver", "cpu", *options)
    return gate.judged(status, text, "only the driver program ran, on the CPU")


def _watch(gate: Gate, program: str, name: str) -> tuple[int | None, str]:
    """Exit status and output, with the spelling of an option that this version takes."""
    status: int | None = None
    text = ""
    for spelling in SPELLINGS:
        only = [argument for kernel in NAMES for argument in (spelling, f"kns={kernel}")]
        until = time.time() + gate.runner.left() - TO_END
        status, text = gate.runner.run(
            *(program, "--tool", name, "--error-exitcode", "86", "--print-limit", "20", *only),
            *(sys.executable, "-m", "bench.gpu.driver", "cuda", "--until", f"{until:.1f}"),
            # Each tensor in an allocation of its own, so that an access beside it is seen.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        if REFUSED not in text:
            break
    return status, text


def _sanitizer(gate: Gate, name: str) -> Outcome:
    """Skipped only where the tool is not there or does not work on this device: else no verdict is a failure."""
    if gate.dry:
        return _driver(gate) if name == "memcheck" else (PASSED, "the program of memcheck")
    program = tool("compute-sanitizer")
    if program is None:
        return SKIPPED, "compute-sanitizer is not installed"
    status, text = _watch(gate, program, name)
    called = [part for part in PARTS if f"called: {part}" in text]
    drop(gate.rows, lambda row: row["op"] == "sanitizer" and row["tool"] == name)
    clean = status == 0 and CLEAN.search(text) is not None
    bad = status == 86 or FOUND.search(text) is not None
    seen = [{"op": "sanitizer", "tool": name, "part": part, "clean": clean and not bad} for part in called]
    add(gate.rows, seen if clean or bad else [])
    if bad:
        gate.runner.say(last_lines(text, 40))
        return FAILED, f"errors were found, while {', '.join(called) or 'nothing'} was called"
    if "Device not supported" in text:
        return SKIPPED, f"it does not work on this device: {last_lines(text, 1)}"
    if not clean:
        gate.runner.say(last_lines(text, 25))
        reason = "out of time" if status is None else last_lines(text, 1) or f"exit status {status}"
        if REFUSED in text:
            reason = f"it refuses {' and '.join(SPELLINGS)}"
        return FAILED, f"no verdict: {reason}; called: {', '.join(called) or 'nothing'}"
    if len(called) < len(PARTS):
        return FAILED, f"clean for {', '.join(called) or 'nothing'}; out of time for the others"
    return PASSED, f"clean for {', '.join(called)}, {'all' if 'every call was made' in text else 'some'} shapes"


def memcheck(gate: Gate) -> Outcome:
    """Accesses beside what was allocated."""
    return _sanitizer(gate, "memcheck")


def racecheck(gate: Gate) -> Outcome:
    """Races in shared memory."""
    return _sanitizer(gate, "racecheck")


METRICS = (
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "gpu__time_duration.sum",
    "launch__registers_per_thread",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def profiled(text: str) -> list[Row]:
    """A row per kernel and metric of ncu's CSV, between whatever else was printed."""
    table = "\n".join(line for line in text.splitlines() if line.startswith('"'))
    return [
        {
            "op": "ncu",
            "kernel": row["Kernel Name"].partition("(")[0],
            "metric": row["Metric Name"],
            "value": float(row["Metric Value"].replace(",", "")),
            "unit": row["Metric Unit"],
        }
        for row in csv.DictReader(io.StringIO(table))
        if row.get("Metric Name") in METRICS
    ]


def ncu(gate: Gate) -> Outcome:
    """The share of the memory's throughput in three kernels: a sampling step, a loss and a norm."""
    if gate.dry:
        return _driver(gate, "--three")
    program = tool("ncu")
    if program is None:
        return SKIPPED, "ncu is not installed"
    status, text = gate.runner.run(
        program,
        *("--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)),
        *("--kernel-name", f"regex:{'|'.join(KERNELS)}", "--launch-count", str(len(KERNELS))),
        *(sys.executable, "-m", "bench.gpu.driver", "cuda", "--three"),
    )
    drop(gate.rows, lambda row: row["op"] == "ncu")
    found = profiled(text)
    add(gate.rows, found)
    gate.runner.say("\n".join(map(json.dumps, found)))
    if not found:
        gate.runner.say(last_lines(text, 10))
        return FAILED, f"no values: {'out of time' if status is None else last_lines(text, 1)}"
    return PASSED, f"{len(found)} values"
