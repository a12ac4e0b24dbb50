"""GELU and its gradients compiled offline through the launchers for every architecture that matters."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dancegrpo_fast import backends
from dancegrpo_fast.kernels.gelu_tanh import triton_kernels as kernels
from dancegrpo_fast.ops import _triton_gelu_tanh as gelu

from ..ops.cases import BF16, F16, F32
from . import offline
from .offline import Compiled

pytestmark = pytest.mark.skipif(backends.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")

# Of 65,536 registers: ten programs of 128 threads share a multiprocessor, eight of those that take several rows.
REGISTERS = {"forward_kernel": 48, "backward_kernel": 48, "gradients_kernel": 64}
# One row of float32 sums, which changes threads before it is stored.
SHARED = 4096


def new(dtype: torch.dtype, width: int, tokens: int = 1000) -> Tensor:
    return torch.empty(2, tokens, width, dtype=dtype, device="meta")


def run_gradients(dtype: torch.dtype, prefix: int, bias: bool = True, tokens: int = 1000) -> None:
    width = 12288
    grad, activation = (new(dtype, prefix + width, tokens) for _ in range(2))
    head = new(dtype, prefix, tokens) if prefix else None
    total = torch.empty(width, dtype=dtype, device="meta") if bias else None
    x, grad_x = (new(dtype, width, tokens) for _ in range(2))
    gelu.gradients(grad[..., prefix:], x, head, activation, grad_x, total)


def assert_lean(found: Compiled, reads: int, writes: int) -> None:
    """No spills, no double, no atomics; only 16-byte accesses, so many of them."""
    assert found.registers <= REGISTERS[found.kernel] or not offline.PINNED, (
        f"{found.kernel}: {found.registers} registers"
    )
    assert found.spilled <= offline.SPILLED
    assert found.shared <= (SHARED if found.kernel == "gradients_kernel" else 0)
    assert not re.search(r"\.f64|\.full\.|\b(?:atom|red)\.", found.ptx)
    # Of an element one power of two and one reciprocal, each one instruction.
    thread = gelu.ROWS_THREAD if found.kernel == "gradients_kernel" else gelu.THREAD
    for name in ("ex2", "rcp"):
        assert len(re.findall(rf"\b{name}\.approx\.ftz\.f32", found.ptx)) == thread
    for kind, wanted in (("ld", reads), ("st", writes)):
        wide, all_of_them = (len(re.findall(rf"\b{kind}\.global{width}", found.ptx)) for width in (r"\.v4\.b32", ""))
        assert wide == all_of_them == wanted, f"{found.kernel}: {wide} wide of {all_of_them} {kind}, want {wanted}"


def assert_all_lean(capability: int, dtype: torch.dtype, folder: Path) -> None:
    with offline.compiling(capability, folder) as launches:
        gelu.forward(new(dtype, 12288), new(dtype, 3072), new(dtype, 15360))
        gelu.backward(new(dtype, 15360)[..., 3072:], new(dtype, 12288), new(dtype, 12288))
        run_gradients(dtype, 3072)
    forward, backward, gradients, sums = launches
    # 16-byte accesses of a thread's part of one tensor; the partial sums are float32.
    each, row, part = (n // 16 for n in (gelu.THREAD * dtype.itemsize, gelu.ROWS_THREAD * dtype.itemsize, 32))
    assert_lean(forward, 2 * each, 2 * each)
    assert_lean(backward, 2 * each, each)
    assert_lean(gradients, 3 * row, 3 * row + part)
    assert sums.kernel == "sum_chunks_kernel"


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_architecture(capability: int, tmp_path: Path) -> None:
    assert_all_lean(capability, BF16, tmp_path)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_all_lean(90, dtype, tmp_path)


def test_without_prefix_and_sum(tmp_path: Path) -> None:
    with offline.compiling(90, tmp_path) as launches:
        gelu.forward(new(BF16, 12288), None, new(BF16, 12288))
        run_gradients(BF16, 0, bias=False)
    forward, gradients = launches
    assert_lean(forward, gelu.THREAD // 8, gelu.THREAD // 8)
    assert_lean(gradients, 2, 2)


def test_lengths_do_not_compile_again(tmp_path: Path) -> None:
    calls = (partial(run_gradients, BF16, 3072, tokens=tokens) for tokens in (1000, 1, 17, 32760))
    offline.assert_compiled_once(tmp_path, [kernels.gradients_kernel], calls)
