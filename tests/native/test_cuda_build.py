"""The CUDA module without a GPU: it loads, says why it cannot run, and its machine code keeps to its budget."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ..processes import LIMIT

KERNELS = ("transition_sample", "transition_log_prob", "transition_gradient", "policy_loss")
# Without a double, and once for each combination of dtypes and guidance.
USUAL, COMBINATIONS = "usual_sample", 6
# Three blocks of those.
USUAL_REGISTERS = 65536 // (3 * 256)
# Two blocks of 256 threads on a multiprocessor of 65,536 registers and at least 48 KiB.
REGISTERS = 65536 // (2 * 256)
SHARED_BYTES = 48 * 1024 // 2


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return pytest.importorskip("dancegrpo_fast._cuda", reason="the CUDA module is not built: no nvcc")


def dump(module: ModuleType, *options: str) -> str:
    """What cuobjdump of the CUDA toolkit, or the one that comes with triton, says about the module."""
    triton = importlib.util.find_spec("triton")
    beside = Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" if triton else Path()
    path = os.pathsep.join([str(beside), os.environ.get("PATH", "")])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        pytest.skip("no cuobjdump")
    command, environment = [tool, *options, str(module.__file__)], os.environ | {"PATH": path}
    return subprocess.check_output(command, env=environment, text=True, timeout=LIMIT)


def test_it_loads_without_a_driver_and_fails_clearly_on_use(module: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "the kernels do not load" in module.device_problem()
    at = 16
    numbers = (at, 0, 1)
    call = (numbers, numbers, None, numbers, 1, 1, at, 1, 0, 0, 1.0, False, False, (0, at, at))
    for run in (
        lambda: module.transition_log_prob(call, at),
        lambda: module.transition_sample(call, None, 1, 0, None, at),
        lambda: module.transition_log_prob_gradient(call, at, numbers, None),
    ):
        with pytest.raises(RuntimeError, match="CUDA: transition_"):
            run()


def test_resources(module: ModuleType) -> None:
    """Every kernel for every GPU: nothing spilled, small enough for two blocks at once."""
    seen, usual, architecture, name = set(), Counter[str](), "", ""
    for line in dump(module, "--dump-resource-usage").splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\w+)", line):
            name = found[1]
        elif (found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)) and "_kernelI" in name:
            registers, stack, shared, local = map(int, found.groups())
            assert stack == local == 0, line
            assert shared <= SHARED_BYTES, line
            if f"{USUAL}_kernel" in name:
                usual[architecture] += 1
                assert registers <= USUAL_REGISTERS, line
                continue
            kernel, scalar = re.search(r"\d+(\w+)_kernelI(\w)E", name).groups()  # type: ignore[union-attr]
            kernel = next(k for k in KERNELS if kernel.endswith(k))
            seen.add((architecture, kernel, scalar))
            assert registers <= REGISTERS, line
    wanted = {(a, k, s) for a in module.architectures.split(",") for k in KERNELS for s in "fd"}
    assert seen == wanted
    assert usual == dict.fromkeys(module.architectures.split(","), COMBINATIONS)


def test_float32_kernels_move_16_bytes_at_once(module: ModuleType) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    kernel = ""
    code = dump(module, "-sass", "-arch", f"sm_{module.architectures.split(',')[-1]}")
    for line in code.splitlines():
        if "Function : " in line and f"{USUAL}_kernel" in line:
            kernel = ""
        elif found := re.search(r"Function : \w+?\d+(\w+)_kernelI(\w)E", line):
            kernel = next(k for k in KERNELS if found[1].endswith(k)) if found[2] == "f" else ""
        elif kernel and (found := re.search(r"\b(LDG|STG)\.E\.128", line)):
            counts[found[1], kernel] += 1
    # Two packets of an operand in float32: latents, output, unconditional output and at least one more.
    assert all(counts["LDG", kernel] >= 8 for kernel in KERNELS)
    assert {kernel for access, kernel in counts if access == "STG"} == {"transition_sample", "transition_gradient"}
