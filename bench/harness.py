"""Timing: contenders of one case take turns in every round, and the copy bandwidth is measured among them."""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast import backends

from .clocks import Clock, Run, Sample, WallClock

__all__ = ["Run", "Timing", "copy_contender", "environment", "interleave"]

COPY_BYTES = 1 << 27
# Well beyond the second-level cache of any GPU.
DEVICE_COPY_BYTES = 1 << 29


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call over the rounds of one contender; `host` where the host's own cost is another number."""

    median: float
    low: float
    high: float
    rounds: int
    calls: int
    host: float | None = None


def _timing(samples: list[Sample], calls: int) -> Timing:
    work = [1e3 * s.work for s in samples]
    host = [1e3 * s.host for s in samples if s.host is not None]
    return Timing(
        statistics.median(work), min(work), max(work), len(work), calls, statistics.median(host) if host else None
    )


def interleave(
    contenders: Mapping[str, Run], rounds: int, budget_s: float = 0.03, clock: Clock | None = None
) -> dict[str, Timing]:
    """Times every contender once a round, starting each round with another one.

    Args:
        contenders: name -> call; the call is given a counter, by which it picks one of its input sets.
        rounds: timed rounds, after one that is thrown away.
        budget_s: about how long a contender runs within a round; at least one call.
        clock: how a contender is timed, default by the wall clock.
    """
    clock = clock or WallClock()
    names = list(contenders)
    for name in names:
        contenders[name](0)
    calls = {name: clock.calls_for(contenders[name], budget_s) for name in names}
    counters = dict.fromkeys(names, 0)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for round_index in range(rounds + 1):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            taken = clock.time(contenders[name], counters[name], calls[name])
            counters[name] += calls[name]
            if round_index > 0:
                samples[name].append(taken)
    return {name: _timing(taken, calls[name]) for name, taken in samples.items()}


def copy_contender(device: torch.device | str = "cpu", size: int = COPY_BYTES) -> tuple[Run, int]:
    """torch's `copy_` between two preallocated tensors of `size` bytes, and the bytes it reads and writes."""
    source, target = torch.ones(size // 4, device=device), torch.zeros(size // 4, device=device)
    return lambda call: target.copy_(source), 2 * size


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    # The gate knows it where its copy of the tree has no repository.
    if known := os.environ.get("BENCH_COMMIT"):
        return known

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    triton = "triton" if importlib.util.find_spec("triton") else None
    return {
        "gpu": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": triton and importlib.metadata.version(triton),
    }


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """What every row carries; of the GPU too where one was measured."""
    gpu = device is not None and device.type == "cuda"
    native = next(b for b in backends.available() if b.name == ("cuda" if gpu else "cpu"))
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        **(_gpu(device) if gpu and device is not None else {}),
        "torch": torch.__version__,
        "kernels": native.detail,
        "python": platform.python_version(),
        "git": _git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
