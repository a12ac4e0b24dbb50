"""The GPU kernels' index arithmetic, tails, sums, tickets and Philox counters, run on the CPU under sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ..processes import LIMIT
from ..release import release_but

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.long
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("settings", release_but(("pairs",), ("pairs", "every")))
def test_a_grid_run_by_the_host_equals_the_cpu_kernels(tmp_path: Path, settings: str) -> None:
    program = tmp_path / "grid_test"
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    warnings = ("-Wall", "-Wextra", "-Werror")
    build = ("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-pthread", *sanitizers, *warnings)
    subprocess.run([COMPILER, *build, str(HERE / "grid_test.cpp"), "-o", str(program)], check=True, timeout=LIMIT)
    found = subprocess.run(
        [program, *(["every"] if settings == "every" else [])], capture_output=True, text=True, timeout=LIMIT
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert ", 0 failed" in found.stdout
