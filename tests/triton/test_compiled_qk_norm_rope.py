"""Queries and keys compiled offline through their launchers for every architecture that matters."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dancegrpo_fast import backends
from dancegrpo_fast.kernels.qk_norm_rope import triton_kernels as kernels
from dancegrpo_fast.kernels.qk_norm_rope import triton_sums
from dancegrpo_fast.ops import _triton_qk_norm_rope as launcher
from dancegrpo_fast.ops._qk_norm_rope import Stream, _backward_outputs, _forward_outputs

from ..ops.cases import BF16, F16, F32
from ..release import release_but
from . import offline
from .offline import Compiled

pytestmark = pytest.mark.skipif(backends.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")

CAPABILITIES = release_but((90,), (80, 90, 100, 120))
# Of 65,536 registers: six, four and eight programs of 128 threads share a multiprocessor.
REGISTERS = {
    "forward_kernel": launcher.FORWARD_REGISTERS,
    "backward_kernel": launcher.BACKWARD_REGISTERS,
    "sum_kernel": 64,
}
# The scratch of a reduction.
SHARED = 8 * 1024


@dataclass(frozen=True)
class Shape:
    """One call's settings and sizes; nothing is in its tensors, which therefore lie on no device."""

    norm: str
    rope: str | None
    full: bool
    mode: str
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype = F32
    heads: int = 24
    dim: int = 128
    batch: int = 2
    tokens: int = 1000
    contiguous: bool = True
    biases: bool = False

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def projected(self) -> Tensor:
        """A third of joint projections, or columns two apart."""
        if self.contiguous:
            width = self.heads * self.dim
            third = self.new(self.batch, self.tokens, 3 * width)[..., width : 2 * width]
            return third.unflatten(-1, (self.heads, self.dim))
        return self.new(self.batch, self.heads, self.tokens, self.dim, 2)[..., 0].transpose(1, 2)

    def stream(self) -> Stream:
        weight = table = None
        if self.norm != "none":
            weight = self.new(self.dim * (self.heads if self.norm == "token" else 1), dtype=self.weight_dtype)
        if self.rope is not None:
            table = self.new(self.tokens, self.dim if self.full else self.dim // 2, dtype=F32)
        return Stream(self.projected(), self.projected(), weight, weight, table, table)


# Of joint streams as models have them, and the extremes of dtypes and sizes.
SHAPES = {
    "heads": Shape("head", "interleaved", True, "fast"),
    "heads with biases": Shape("head", "interleaved", False, "fast", biases=True),
    "heads by halves": Shape("head", "half", True, "lossless"),
    "heads rounded twice": Shape("head_twice", "interleaved", False, "lossless", weight_dtype=BF16),
    "tokens": Shape("token", "interleaved", False, "fast", heads=40),
    "rotation alone": Shape("none", "interleaved", False, "lossless"),
}
MORE = {
    "float32": Shape("head", "interleaved", True, "fast", F32),
    "float16": Shape("head", "interleaved", True, "lossless", F16, F16),
    "72": Shape("head", "interleaved", True, "fast", heads=16, dim=72),
    "80 by halves": Shape("token", "half", True, "lossless", heads=16, dim=80),
    "256": Shape("head", "interleaved", True, "lossless", dim=256),
    "64": Shape("head", None, False, "fast", dim=64),
    "17": Shape("head", None, False, "fast", dim=17),
    "strided": Shape("head", "interleaved", True, "fast", contiguous=False),
    "strided tokens": Shape("token", "half", True, "lossless", F32, contiguous=False),
}


def run(shape: Shape) -> None:
    stream = shape.stream()
    outputs = _forward_outputs([stream], shape.norm)
    rope = shape.rope or "interleaved"
    launcher.forward([stream], shape.norm, 1e-6, rope, "each", shape.mode, outputs)
    grads = [shape.new(shape.batch, shape.heads, shape.tokens, shape.dim).transpose(1, 2) for _ in "qk"]
    wanted = [True, True, *[shape.norm != "none"] * 2, *[shape.biases] * 2]
    found = _backward_outputs([stream], wanted)
    rest = [stream], shape.norm, 1e-6, rope, "each", shape.mode, found
    launcher.backward(grads[0], grads[1], (outputs[2], outputs[3]), *rest)


def assert_lean(found: Compiled, registers: int) -> None:
    assert found.registers <= registers or not offline.PINNED, f"{found.kernel}: {found.registers} registers"
    assert found.spilled <= offline.SPILLED, f"{found.kernel}: {found.spilled} bytes of local memory"
    assert found.shared <= SHARED
    assert ".f64" not in found.ptx
    # In bfloat16, fma by 1 is how sm_80 adds two rounded numbers; nothing else contracts.
    assert not re.search(r"\bfma\.\S*f32", found.ptx)
    assert not re.search(r"\b(?:atom|red)\.", found.ptx)


def count(pattern: str, found: Compiled) -> int:
    return len(re.findall(pattern, found.ptx))


def assert_wide_accesses(launches: list[Compiled], shape: Shape) -> None:
    """A thread's 8 numbers of each of queries and keys move by 16 bytes, or by 8 where halves of heads are paired."""
    words, each = ("v2", 2) if shape.rope == "half" else ("v4", 2 if shape.dtype == F32 else 1)
    assert count(rf"\bst\.global\.{words}\.b32", launches[0]) == 2 * each
    assert count(rf"\bld\.global\.{words}\.b32", launches[0]) >= 2 * each
    assert count(rf"\bst\.global\.{words}\.b32", launches[1]) >= 2 * each
    assert count(rf"\bld\.global\.{words}\.b32", launches[1]) >= (2 if shape.norm == "none" else 4) * each


# Of each norm one.
FEW = ("heads with biases", "tokens", "rotation alone")


@pytest.mark.parametrize("name", release_but(FEW, SHAPES))
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_architecture(capability: int, name: str, tmp_path: Path) -> None:
    launches = offline.launched(capability, tmp_path, run, SHAPES[name])
    kinds, sums = list(REGISTERS), (SHAPES[name].norm != "none") + SHAPES[name].biases
    assert [c.kernel for c in launches] == kinds[:2] + kinds[2:] * sums
    for found in launches:
        assert_lean(found, REGISTERS[found.kernel])
    assert_wide_accesses(launches, SHAPES[name])


@pytest.mark.parametrize("name", release_but(("float32", "72", "17", "strided"), MORE))
def test_other_dtypes_sizes_and_strides(name: str, tmp_path: Path) -> None:
    launches = offline.launched(90, tmp_path, run, MORE[name])
    aligned = MORE[name].contiguous and name not in ("17", "80 by halves")
    for found in launches:
        assert_lean(found, REGISTERS[found.kernel] if aligned else launcher.UNALIGNED_REGISTERS)
    if aligned:
        assert_wide_accesses(launches, MORE[name])


def test_lengths_do_not_compile_again(tmp_path: Path) -> None:
    """Neither batch nor tokens, of the joint sequence or rotated, are part of what is compiled."""
    made = kernels.forward_kernel, kernels.backward_kernel, triton_sums.sum_kernel
    shape = Shape("head", "interleaved", True, "fast")
    sizes = ((2, 1000), (1, 1), (3, 17), (16, 64), (1, 32760))
    calls = (partial(run, replace(shape, batch=batch, tokens=tokens)) for batch, tokens in sizes)
    offline.assert_compiled_once(tmp_path, made, calls)
