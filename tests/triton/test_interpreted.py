"""The Triton kernels in Triton's interpreter, in processes of their own: the switch is read at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..processes import LIMIT

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = sorted(str(path) for path in HERE.glob("interpreted_*.py"))
# Two processes of about the same length: each one imports torch and Triton first.
HALVES = {"the last three": FILES[-3:], "the others": FILES[:-3]}


@pytest.mark.parametrize("half", HALVES)
def test_interpreted(half: str) -> None:
    # -P: the installed package, not the folder that the tests start in.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    run = subprocess.run(
        [*command, *HALVES[half]],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout and "skipped" not in run.stdout
