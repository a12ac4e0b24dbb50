"""Timing: contenders of one case take turns in every round, and the copy bandwidth is measured among them."""

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast import backends

Run = Callable[[int], object]

COPY_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call over the rounds of one contender."""

    median: float
    low: float
    high: float
    rounds: int
    calls: int


def _calls_for(run: Run, budget_s: float) -> int:
    start = time.perf_counter()
    run(0)
    return max(1, min(500, round(budget_s / max(time.perf_counter() - start, 1e-7))))


def interleave(contenders: Mapping[str, Run], rounds: int, budget_s: float = 0.03) -> dict[str, Timing]:
    """Times every contender once a round, starting each round with another one.

    Args:
        contenders: name -> call; the call is given a counter, by which it picks one of its input sets.
        rounds: timed rounds, after one that is thrown away.
        budget_s: about how long a contender runs within a round; at least one call.
    """
    names = list(contenders)
    for name in names:
        contenders[name](0)
    calls = {name: _calls_for(contenders[name], budget_s) for name in names}
    counters = dict.fromkeys(names, 0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(rounds + 1):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            run, first, count = contenders[name], counters[name], calls[name]
            start = time.perf_counter()
            for call in range(first, first + count):
                run(call)
            elapsed = time.perf_counter() - start
            counters[name] += count
            if round_index > 0:
                samples[name].append(1e3 * elapsed / count)
    return {
        name: Timing(statistics.median(taken), min(taken), max(taken), rounds, calls[name])
        for name, taken in samples.items()
    }


def copy_contender() -> tuple[Run, int]:
    """torch's `copy_` between two preallocated tensors well beyond any cache, and the bytes it reads and writes."""
    source, target = torch.ones(COPY_ELEMENTS), torch.zeros(COPY_ELEMENTS)
    return lambda call: target.copy_(source), 8 * COPY_ELEMENTS


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """What every row carries."""
    native = next(b for b in backends.available() if b.name == "cpu")
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": native.detail,
        "python": platform.python_version(),
        "git": _git_revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
