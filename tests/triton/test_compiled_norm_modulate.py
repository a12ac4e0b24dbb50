"""Norm, modulation and gated residual compiled offline, through their launchers, for every architecture."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dancegrpo_fast import backends
from dancegrpo_fast.kernels.common import triton_rows
from dancegrpo_fast.kernels.gated_residual import triton_kernels as residual_kernels
from dancegrpo_fast.kernels.norm_modulate import triton_kernels as kernels
from dancegrpo_fast.ops import _triton_gated_residual as residual
from dancegrpo_fast.ops import _triton_norm_modulate as norm_modulate

from ..ops.cases import BF16, F16, F32
from ..release import release_but
from . import offline
from .offline import Compiled

pytestmark = pytest.mark.skipif(backends.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")

CAPABILITIES = release_but((90,), (80, 90, 100, 120))
# The forward at 64 a thread leaves room for several programs on a multiprocessor; in "fast" its programs have half the
# threads or fewer, of up to 40 elements each. The backward holds a row and its sums: where it runs 16 warps they may
# use 128, else 255.
FORWARD_REGISTERS, PIECES_REGISTERS, RESIDUAL_REGISTERS = 64, 128, 64
# Two sums beside float32 rows: seven programs of 128 threads share a multiprocessor, not eight.
RESIDUAL_SUMS_REGISTERS = 72
BACKWARD_REGISTERS, OTHER_BACKWARD_REGISTERS = 128, 255
# What the smallest architecture gives a program.
SHARED = 99 * 1024
BATCH, TOKENS = 2, 4096


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Norm:
    """Sizes and settings of a call, forward or backward; `frozen`: nothing but the tokens gets a gradient."""

    channels: int = 3072
    dtype: torch.dtype = BF16
    mode: str = "fast"
    norm: str = "layer"
    split: int = -1
    gated: bool = True
    affine: bool = False
    frozen: bool = False
    biased: bool = False
    grads: int = 1
    tokens: int = TOKENS
    batch: int = BATCH

    def x(self) -> Tensor:
        return empty(self.batch, self.tokens, self.channels, dtype=self.dtype)

    def numbers(self) -> Tensor:
        return empty(self.batch, self.tokens, dtype=F32)

    def parameters(self) -> list[Tensor | None]:
        """Gate, scale, shift, weight and bias."""
        rows = [empty(self.batch, 1 if self.split < 0 else 2, self.channels, dtype=self.dtype) for _ in range(3)]
        vectors = [empty(self.channels, dtype=self.dtype) if self.affine else None for _ in range(2)]
        return [rows[0] if self.gated else None, *rows[1:], *vectors]

    def given(self) -> norm_modulate.Given:
        return norm_modulate.Given(*self.parameters(), self.split, self.norm, 1e-6, self.mode, None)


def forward(*sizes: object, **how: object) -> None:
    n = Norm(*sizes, **how)
    outputs = (n.x(), n.x(), n.numbers(), n.numbers())
    norm_modulate.forward(n.x(), n.x() if n.gated else None, n.given(), outputs)


def backward(*sizes: object, **how: object) -> None:
    n = Norm(*sizes, **how)
    y = n.x() if n.gated and not n.frozen else None
    outputs = [n.x(), n.x() if n.gated else None, *([None] * 5 if n.frozen else n.parameters())]
    outputs.append(empty(n.channels, dtype=n.dtype) if n.biased else None)
    tokens = (n.x(), [n.x() for _ in range(n.grads)], n.x())
    norm_modulate.backward(*tokens, n.numbers(), n.numbers(), y, n.given(), outputs)


def residual_forward(channels: int = 3072, dtype: torch.dtype = BF16, mode: str = "fast", tokens: int = TOKENS) -> None:
    x, gate = empty(BATCH, tokens, channels, dtype=dtype), empty(BATCH, 1, channels, dtype=dtype)
    residual.forward(x, x, gate, -1, mode, x)


def residual_backward(
    channels: int = 3072, dtype: torch.dtype = BF16, mode: str = "fast", tokens: int = TOKENS, biased: bool = False
) -> None:
    x, gate = empty(BATCH, tokens, channels, dtype=dtype), empty(BATCH, 1, channels, dtype=dtype)
    bias = empty(channels, dtype=dtype) if biased else None
    residual.backward(x, x, gate, -1, mode, [empty(*x.shape, dtype=dtype), empty(*gate.shape, dtype=dtype), bias])


RUNS: dict[str, tuple[Callable[..., None], dict[str, object]]] = {
    "norm": (forward, {"gated": False}),
    "gated norm": (forward, {"affine": True}),
    "norm gradient": (backward, {"gated": False}),
    "gated norm gradient": (backward, {}),
    "gated affine norm gradient": (backward, {"affine": True}),
    "three consumers": (backward, {"gated": False, "grads": 3}),
    "five consumers": (backward, {"gated": False, "grads": 5}),
    "segments": (backward, {"split": 100, "norm": "rms"}),
    "frozen modulation": (backward, {"frozen": True}),
    "bias behind the gate": (backward, {"biased": True}),
    "residual": (residual_forward, {}),
    "residual gradient": (residual_backward, {}),
    "bias behind the residual's gate": (residual_backward, {"biased": True}),
}


def registers_for(run: Callable[..., None], found: Compiled, channels: int, mode: str) -> int:
    if found.kernel == "sum_chunks_kernel" or run is residual_forward:
        return RESIDUAL_REGISTERS
    if run is residual_backward:
        return RESIDUAL_SUMS_REGISTERS
    if run is forward:
        return PIECES_REGISTERS if norm_modulate.row_of(channels, mode)[2] > 1 else FORWARD_REGISTERS
    return BACKWARD_REGISTERS if 2048 < channels <= norm_modulate.LONG else OTHER_BACKWARD_REGISTERS


def assert_lean(run: Callable[..., None], found: Compiled, channels: int, mode: str) -> None:
    assert found.spilled <= offline.SPILLED, f"{found.kernel}: {found.spilled} bytes of local memory"
    budget = registers_for(run, found, channels, mode)
    assert found.registers <= budget or not offline.PINNED, (
        f"{found.kernel}: {found.registers} registers, budget {budget}"
    )
    assert found.shared <= SHARED
    # sm_80 multiplies bfloat16 by fma(a, b, -0), a product rounded once. "fast" forwards contract where told to.
    contracts = mode == "fast" and run in (forward, residual_forward) and found.kernel == "forward_kernel"
    fma = r"|\bfma\.rn(\.ftz)?\.f32" if not contracts else ""
    assert not re.search(rf"\.f64{fma}|\.approx|\.full\.", found.ptx)


def assert_wide_accesses(found: Compiled) -> None:
    """Rows move 16 bytes at a time, past registers or through them; only a token's two numbers are single."""
    kinds = Counter(re.findall(r"\b(?:ld|st)\.global\S*", found.ptx))
    ahead = Counter(re.findall(r"\bcp\.async\.c[ag]\b", found.ptx))
    assert set(kinds) <= {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.b32", "st.global.b32"}
    assert kinds["ld.global.b32"] <= 2 and kinds["st.global.b32"] <= 2
    # cp.async.cg has 16 bytes always; the two numbers are fetched before the loop and in it.
    assert ahead["cp.async.ca"] <= 4
    assert kinds["st.global.v4.b32"] and (kinds["ld.global.v4.b32"] or ahead["cp.async.cg"])


# Channels, dtype and mode: first the two that came close to a spill.
ROWS = ((5120, BF16, "fast"), (8192, F32, "fast"), (3072, BF16, "lossless"), (3072, F32, "fast"))


# Of each kernel one, with most operands.
FEW = ("gated norm", "gated affine norm gradient", "five consumers", "bias behind the residual's gate")


@pytest.mark.parametrize("row", release_but(ROWS[:1], ROWS), ids=str)
@pytest.mark.parametrize("name", release_but(FEW, RUNS))
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_architecture(capability: int, name: str, row: tuple, tmp_path: Path) -> None:
    """No spills, narrow accesses or contracted products."""
    run, how = RUNS[name]
    channels, dtype, mode = row
    for found in offline.launched(capability, tmp_path, run, channels, dtype, mode=mode, **how):
        assert_lean(run, found, channels, mode)
        if found.kernel != "sum_chunks_kernel":
            assert_wide_accesses(found)


@pytest.mark.parametrize("name", release_but(("gated norm", "gated norm gradient", "residual"), RUNS))
def test_half_precision(name: str, tmp_path: Path) -> None:
    run, how = RUNS[name]
    for channels, mode in ((1536, "lossless"), (8192, "fast")):
        for found in offline.launched(90, tmp_path, run, channels, F16, mode=mode, **how):
            assert_lean(run, found, channels, mode)


def test_lossless_rounds_in_hardware(tmp_path: Path) -> None:
    for run in (forward, backward, residual_forward, residual_backward):
        assert re.search(r"\b(?:cvt|mul)\.rn\.bf16", offline.launched(90, tmp_path, run, mode="lossless")[0].ptx)


def test_rows_of_one_channel(tmp_path: Path) -> None:
    """Other small and odd rows are those of the small models."""
    for run, how in RUNS.values():
        for found in offline.launched(90, tmp_path, run, 1, **how):
            assert found.spilled == 0 and ".f64" not in found.ptx


def test_launches(tmp_path: Path) -> None:
    """One launch forward; backward one, and one for all sums; two before it where sums do not fit the registers."""
    names = {
        forward: ["forward_kernel"],
        backward: ["backward_kernel", "sum_chunks_kernel"],
        residual_forward: ["forward_kernel"],
        residual_backward: ["backward_kernel", "sum_chunks_kernel"],
    }
    for run, wanted in names.items():
        assert [found.kernel for found in offline.launched(90, tmp_path, run)] == wanted
    assert [found.kernel for found in offline.launched(90, tmp_path, backward, frozen=True)] == ["backward_kernel"]
    found = offline.launched(90, tmp_path, backward, 8192, affine=True)
    assert [launch.kernel for launch in found] == ["backward_kernel", "backward_kernel", "sum_chunks_kernel"]


@pytest.mark.parametrize(("tokens", "programs"), [(512, 128), (4096, 512), (16_900, 498), (75_600, 511)])
def test_chunks(tokens: int, programs: int, tmp_path: Path) -> None:
    """Enough of them for a GPU from a few hundred tokens on, and never many."""
    assert offline.launched(90, tmp_path, backward, 64, tokens=tokens, batch=1)[0].programs == programs


def test_lengths_do_not_compile_again(tmp_path: Path) -> None:
    """Neither batch, tokens nor split is part of what is compiled."""
    made = (kernels.forward_kernel, kernels.backward_kernel, triton_rows.sum_chunks_kernel)
    made += (residual_kernels.forward_kernel, residual_kernels.backward_kernel)

    def call(batch: int, tokens: int, split: int) -> None:
        forward(tokens=tokens, batch=batch, split=split)
        backward(tokens=tokens, batch=batch, split=split)
        residual_forward(tokens=tokens)
        residual_backward(tokens=tokens)

    calls = ((2, 4096, 512), (1, 17, 0), (3, 4099, 4099), (2, 75_600, 16))
    offline.assert_compiled_once(tmp_path, made, (partial(call, *each) for each in calls))
