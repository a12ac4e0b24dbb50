"""The compiled tests of models and policy ops with other Tritons, from the folders that `make install` fills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..processes import LIMIT, pytest_elsewhere
from ..release import release_but

pytest.importorskip("triton")
HERE = Path(__file__).parent
# What torch 2.10 and 2.11 bring; more are tried where there are folders.
WANTED = "triton-3.6.0"
FOLDERS = sorted({WANTED, *(folder.name for folder in Path(sys.prefix).glob("triton-*"))})
# FLUX has every kernel, and the other models call them in other ways.
PARTS = {
    "FLUX": (
        "test_compiled_models.py::test_a_model_compiles[flux]",
        "test_compiled.py::test_guidance_and_steps_per_sample[sample seeded]",
        "test_compiled.py::test_guidance_and_steps_per_sample[loss gradient]",
    ),
    "every model": ("test_compiled_models.py", "test_bound.py"),
}


@pytest.mark.long
@pytest.mark.parametrize("part", release_but(("FLUX",), PARTS))
@pytest.mark.parametrize("name", FOLDERS)
def test_compiled_with(name: str, part: str, pytestconfig: pytest.Config) -> None:
    folder = Path(sys.prefix) / name
    if not folder.is_dir():
        missing = f"{folder} is not there; make install puts it there"
        pytest.fail(missing) if "CI" in os.environ else pytest.skip(missing)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = [sys.executable, "-P", "-c", "import triton; print(triton.__version__)"]
    version = subprocess.check_output(asked, env=os.environ | {"PYTHONPATH": path}, text=True, timeout=LIMIT)
    assert f"triton-{version.strip()}" == name
    pytest_elsewhere(pytestconfig, [f"{HERE}/{file}" for file in PARTS[part]], PYTHONPATH=path)
