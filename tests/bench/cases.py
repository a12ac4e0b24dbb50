"""Runs pytest in a process of its own, as the gate does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.rows import read

from ..processes import LIMIT

ROOT = Path(__file__).parents[2]
ONCE = ("--benchmark-min-rounds", "1", "--benchmark-max-time", "0")
Done = subprocess.CompletedProcess[str]


def by_itself() -> dict[str, str]:
    """The environment without pytest's own words: under xdist pytest-benchmark would measure nothing."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def run_pytest(out: Path, *options: str, folder: Path = ROOT) -> tuple[Done, list[dict[str, Any]]]:
    """What it printed, and the rows in `out`, where there are lines of the tests as well."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.reports"]
    command += ["--lines", str(out / "lines"), "--rows", str(out / "rows"), *options]
    environment = {**by_itself(), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    return done, read(out / "rows")
