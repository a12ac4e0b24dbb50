"""What is installed, what it says of itself, and the build's options."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

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
    # An architecture is asked for, or AUTO leaves CUDA out for a CPU build of torch already.
    options = ("-DDGF_CUDA_ARCHITECTURES=90", f"-DDGF_NVCC={broken}", f"-DDGF_CUDA={value}")
    options += (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",)
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (result.returncode == 0) == (value == "AUTO")
    assert f"DGF_CUDA={value}: nvcc ({broken}) does not compile here" in " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def announced(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What a configuration says it compiles where nvidia-smi shows GPUs of compute capability 9.0 and 10.3."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("nvcc and cmake are not both on the PATH")
    folder = tmp_path_factory.mktemp("announced")
    shown = folder / "nvidia-smi"
    shown.write_text("#!/bin/sh\necho 9.0\necho 10.3\necho 9.0\n")
    shown.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "CUDAARCHS")}

    def configured(*options: str, **environment: str) -> str:
        # One folder, so that compilers are looked at once; what an earlier call set is forgotten.
        command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-UDGF_CUDA", "-UDGF_CUDA_ARCHITECTURES"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        command += [f"-DDGF_NVIDIA_SMI={shown}", *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=kept | environment)
        lines = [line for line in result.stdout.splitlines() if "dancegrpo_fast compiles" in line]
        return lines[0] if result.returncode == 0 and len(lines) == 1 else result.stdout + result.stderr

    return configured


def test_the_build_compiles_for_the_gpus_that_are_wanted_and_says_so(announced: Callable[..., str]) -> None:
    assert (
        "_cpu" in (said := announced("-DDGF_CUDA=ON")) and "CUDA for compute capability 90,100 (the GPUs here" in said
    )
    assert "--config-settings=cmake.define.DGF_CUDA=OFF" in said


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0;9.0a+PTX", "compute capability 80,90 (TORCH_CUDA_ARCH_LIST"),
        ("7.0 8.6 12.1", "compute capability 86,120 (TORCH_CUDA_ARCH_LIST"),
        ("7.5", "compute capability is 7.5 (TORCH_CUDA_ARCH_LIST), and at least 8.0 is needed"),
    ],
)
def test_torch_s_list_of_architectures_is_taken(announced: Callable[..., str], listed: str, expected: str) -> None:
    assert expected in " ".join(announced("-DDGF_CUDA=ON", TORCH_CUDA_ARCH_LIST=listed).split())


def test_a_cpu_build_of_torch_gets_no_cuda_module_unless_it_is_asked_for(announced: Callable[..., str]) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert "no CUDA (the torch here is a CPU build" in announced()
    assert "compute capability 120 (DGF_CUDA_ARCHITECTURES" in announced("-DDGF_CUDA_ARCHITECTURES=120")
