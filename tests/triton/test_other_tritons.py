"""The compiled tests of models and policy ops with other Tritons, from the folders that `make install` fills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..processes import LIMIT

pytest.importorskip("triton")
HERE = Path(__file__).parent
# What torch 2.10 and 2.11 bring; more are tried where there are folders.
WANTED = "triton-3.6.0"
FOLDERS = sorted({WANTED, *(folder.name for folder in Path(sys.prefix).glob("triton-*"))})


def output(*arguments: str, folder: Path) -> str:
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    # -P: the installed package, not the folder that the tests start in.
    command = [sys.executable, "-P", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("name", FOLDERS)
def test_compiled_with(name: str) -> None:
    folder = Path(sys.prefix) / name
    if not folder.is_dir():
        missing = f"{folder} is not there; make install puts it there"
        pytest.fail(missing) if "CI" in os.environ else pytest.skip(missing)
    version = output("-c", "import triton; print(triton.__version__)", folder=folder)
    assert f"triton-{version.strip()}" == name
    policy_ops = f"{HERE}/test_compiled.py::test_guidance_and_steps_per_sample"
    files = [f"{HERE}/test_compiled_models.py", policy_ops]
    report = output("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, folder=folder)
    assert "passed" in report and "skipped" not in report, report
