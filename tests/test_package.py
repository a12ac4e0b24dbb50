"""What is installed, what it says of itself, and the build's options."""

import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from .processes import LIMIT

ROOT = Path(__file__).parents[1]


def test_the_installed_package_is_tested() -> None:
    import dancegrpo_fast

    home = Path(dancegrpo_fast.__file__)
    assert home.is_relative_to(sysconfig.get_paths()["purelib"]), f"the tests import {home}, want the installed package"
    assert dancegrpo_fast.__version__ == metadata.version("dancegrpo_fast")


def test_info_names_versions_and_reasons() -> None:
    report = subprocess.run(
        [sys.executable, "-m", "dancegrpo_fast.info"], capture_output=True, text=True, check=True, timeout=LIMIT
    )
    for expected in (
        "torch 2",
        "cpu        available",
        "reference  available",
        "compiled by",
    ):
        assert expected in report.stdout


def test_extras_and_core_dependencies() -> None:
    extras = set(metadata.metadata("dancegrpo_fast").get_all("Provides-Extra"))
    assert {"triton", "flash", "xformers", "train", "bench", "test", "dev"} <= extras
    core = [line for line in metadata.requires("dancegrpo_fast") or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in core) == ["numpy", "torch"]
    assert not any("==" in line.split(";")[0] for line in metadata.requires("dancegrpo_fast") or [])


def test_kernels_stay_a_namespace() -> None:
    import dancegrpo_fast

    assert not (Path(dancegrpo_fast.__file__).parent / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('make')}",
        f"-DCMAKE_CXX_COMPILER={shutil.which('g++') or shutil.which('clang++')}",
        # Nothing but what is named: a CUDA toolkit of this machine must not decide the test.
        "-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF",
        "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF",
        "-DDGF_NVCC=OFF",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH")
@pytest.mark.parametrize(
    ("value", "message"), [("ON", "DGF_CUDA=ON needs nvcc"), ("MAYBE", "DGF_CUDA: got MAYBE, want AUTO, ON or OFF")]
)
def test_cuda_option_fails_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    result = configure(tmp_path, f"-DDGF_CUDA={value}")
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH")
@pytest.mark.parametrize("value", ["AUTO", "ON"])
def test_a_broken_cuda_compiler_costs_only_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """AUTO leaves the CUDA kernels out and says so; ON fails."""
    pybind11 = pytest.importorskip("pybind11")
    monkeypatch.delenv("CUDACXX", raising=False)
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    options = (f"-DDGF_NVCC={broken}", f"-DDGF_CUDA={value}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (result.returncode == 0) == (value == "AUTO")
    assert f"DGF_CUDA={value}: nvcc ({broken}) does not compile here" in " ".join(result.stderr.split())
