"""The Triton kernels compiled offline, through the launcher, for every architecture that matters."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from dancegrpo_fast import backends
from dancegrpo_fast.kernels.transition import triton_kernels as kernels
from dancegrpo_fast.ops import _triton
from dancegrpo_fast.ops._call import Noise, Transition

from ..ops.cases import BF16, F16, F32, dtype_id
from ..release import release_but
from . import offline
from .offline import BATCH, MIXES, Compiled, Tensors

pytestmark = pytest.mark.skipif(backends.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")

# Of 65,536 registers, at 80 a thread three programs of 256 threads share a multiprocessor, at 128 two: 8,192 elements
# and 80 KiB under way, several times what the latency of memory asks for.
REGISTERS = {"sample_kernel": 80, "log_prob_kernel": 64, "gradient_kernel": 64, "policy_loss_kernel": 80}
REGISTERS_WITH_OPTIONS = 128
# A conversion of layouts of one block of 16-bit numbers, or the scratch of a reduction; far below what limits programs.
SHARED = 16 * 1024
SIZES = {F32: 4, BF16: 2, F16: 2}
# Up to Triton 3.5, divisions and roots flush subnormals, and no option keeps them.
FLUSHES = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)

Run = Callable[[Tensors], None]
# name: what runs, and how many [B, ...] tensors of each of (latents, output, next latents, noise) are read, written
RUNS: dict[str, tuple[Run, tuple[int, int, int, int], tuple[int, int, int]]] = {
    "sample seeded": (offline.sample, (1, 1, 0, 0), (0, 0, 1)),
    "sample given": (lambda t: offline.sample(t, seeded=False), (1, 1, 0, 1), (0, 0, 1)),
    "log_prob": (offline.log_prob, (1, 1, 1, 0), (0, 0, 0)),
    "log_prob gradient": (offline.log_prob_gradient, (1, 1, 1, 0), (0, 1, 0)),
    "loss": (offline.policy_loss, (1, 1, 1, 0), (0, 0, 0)),
    "loss with options": (lambda t: offline.policy_loss(t, options=True), (1, 3, 1, 0), (0, 0, 0)),
    "loss gradient": (offline.policy_loss_gradient, (1, 1, 1, 0), (0, 1, 0)),
    "loss gradient with options": (lambda t: offline.policy_loss_gradient(t, options=True), (1, 3, 1, 0), (0, 1, 0)),
}

# They came close to a spill, and are tried in float32 on every architecture.
CLOSE = ("sample seeded", "loss")
# One of each kernel, with most operands.
DISASSEMBLED = ("sample given", "log_prob", "loss with options", "loss gradient with options")


def architectures() -> Iterator[Any]:
    """Architectures, kernels and dtypes; on one architecture with three mixes of them."""
    for capability in (80, 90, 100, 120):
        for name in RUNS:
            few = 2 if name in CLOSE else 1
            for number, dtypes in enumerate(MIXES[: 3 if capability == 90 else few]):
                stays = capability == 90 and number < few and name in (*CLOSE, *DISASSEMBLED)
                marks = () if stays else pytest.mark.release
                yield pytest.param(capability, name, dtypes, marks=marks, id=f"{capability} {name} {dtype_id(dtypes)}")


def compile_one(run: Run, tensors: Tensors, capability: int, folder: Path) -> Compiled:
    launches = offline.launched(capability, folder, run, tensors)
    assert len(launches) == 1, "want one launch a call"
    return launches[0]


def assert_lean(found: Compiled, more_outputs: bool = False) -> None:
    budget = REGISTERS_WITH_OPTIONS if more_outputs else REGISTERS[found.kernel]
    assert found.registers <= budget or not offline.PINNED, f"{found.registers} registers"
    assert found.spilled <= offline.SPILLED, f"{found.spilled} bytes of local memory"
    assert found.shared <= SHARED
    assert ".f64" not in found.ptx
    # Nothing contracts, flushes or approximates: the bits are the C++ kernel's.
    ptx = re.sub(r"\b(div|sqrt)\.rn\.ftz\.", r"\1.rn.", found.ptx) if FLUSHES else found.ptx
    assert not re.search(r"\bfma\.|\.ftz|\.approx|\.full\.", ptx)


def sixteen_bytes(dtypes: list[torch.dtype]) -> int:
    """16-byte accesses a thread needs for its part of so many tensors."""
    threads = 32 * _triton.WARPS
    return sum(_triton.BLOCK // threads * SIZES[dtype] // 16 for dtype in dtypes)


def assert_wide_accesses(found: Compiled, dtypes: tuple, reads: tuple, writes: tuple) -> None:
    of = (*dtypes, F32)
    loads = sixteen_bytes([of[i] for i, count in enumerate(reads) for _ in range(count)])
    stores = sixteen_bytes([of[i] for i, count in enumerate(writes) for _ in range(count)])
    assert len(re.findall(r"\bld\.global\.v4\.b32", found.ptx)) == loads
    assert len(re.findall(r"\bst\.global\.v4\.b32", found.ptx)) == stores


def assert_accesses_stay_wide(found: Compiled) -> None:
    """The assembler leaves 16-byte accesses whole."""
    for ptx, sass in (
        (r"\bld\.global\.v4\.b32", r"\bLDG\.E\.128(?!\S*STRONG)"),
        (r"\bst\.global\.v4\.b32", r"\bSTG\.E\.128"),
    ):
        assert len(re.findall(sass, found.sass)) == len(re.findall(ptx, found.ptx))


@pytest.mark.parametrize(("capability", "name", "dtypes"), list(architectures()))
def test_every_architecture(capability: int, name: str, dtypes: tuple, tmp_path: Path) -> None:
    run, reads, writes = RUNS[name]
    found = compile_one(run, Tensors(dtypes), capability, tmp_path)
    assert_lean(found, name == "loss with options")
    assert_wide_accesses(found, dtypes, reads, writes)
    # Once a kernel and architecture: whatever the dtypes, the assembler is given the same two instructions.
    if dtypes is MIXES[0] and name in DISASSEMBLED:
        assert_accesses_stay_wide(found)


@pytest.mark.parametrize("name", ["sample seeded", "log_prob", "loss gradient"])
@pytest.mark.parametrize("dtypes", release_but(MIXES[4:], MIXES[3:]), ids=dtype_id)
def test_other_dtypes(dtypes: tuple, name: str, tmp_path: Path) -> None:
    run, reads, writes = RUNS[name]
    found = compile_one(run, Tensors(dtypes), 90, tmp_path)
    assert_lean(found)
    assert_wide_accesses(found, dtypes, reads, writes)


@pytest.mark.parametrize("name", release_but(("sample seeded", "loss gradient"), RUNS))
def test_guidance_and_steps_per_sample(name: str, tmp_path: Path) -> None:
    run, reads, writes = RUNS[name]
    tensors = Tensors(cfg=True, per_sample=True)
    found = compile_one(run, tensors, 90, tmp_path)
    assert_lean(found, more_outputs=True)
    reads = (reads[0], reads[1] + 1, *reads[2:])
    assert_wide_accesses(found, tensors.dtypes, reads, (writes[0], 2 * writes[1], writes[2]))


@pytest.mark.parametrize("capability", release_but((120,), (80, 100, 120)))
def test_guidance_in_float32_does_not_spill(capability: int, tmp_path: Path) -> None:
    """Three float32 operands and the last steps of the loss: what asks for most registers without options."""
    tensors = Tensors(MIXES[1], cfg=True, per_sample=True)
    assert_lean(compile_one(offline.policy_loss, tensors, capability, tmp_path), more_outputs=True)


@pytest.mark.parametrize(
    "name", release_but(("sample seeded", "loss gradient"), ["sample seeded", "loss with options", "loss gradient"])
)
def test_reference_rounding(name: str, tmp_path: Path) -> None:
    """Products are rounded in hardware, as stored latents are."""
    found = compile_one(RUNS[name][0], Tensors(rounding=True), 90, tmp_path)
    assert_lean(found, name == "loss with options")
    assert re.search(r"\bcvt\.rn\.bf16", found.ptx)


def test_noise_takes_correctly_rounded_roots(tmp_path: Path) -> None:
    found = compile_one(RUNS["sample seeded"][0], Tensors(), 90, tmp_path)
    assert ("sqrt.rn.ftz.f32" if FLUSHES else "sqrt.rn.f32") in found.ptx


@pytest.mark.parametrize("name", ["sample seeded", "loss", "loss gradient"])
def test_huge_samples(name: str, tmp_path: Path) -> None:
    """More than 2^31 elements a sample: wide indices cost neither registers nor 16-byte accesses."""
    run, reads, writes = RUNS[name]
    found = compile_one(run, Tensors(shape=(3, 2**31 + 16), device="meta"), 90, tmp_path)
    assert_lean(found)
    assert_wide_accesses(found, MIXES[0], reads, writes)
    assert found.programs == 3 * (2**31 // _triton.BLOCK + 1)


@pytest.mark.parametrize(
    "name",
    release_but(
        ("sample given", "loss gradient"), ["sample seeded", "sample given", "loss with options", "loss gradient"]
    ),
)
def test_strided_operands(name: str, tmp_path: Path) -> None:
    """Four dimensions that do not merge: no spills, still one launch."""

    def strided(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(BATCH, 4, 4, 48, 32).new_empty(BATCH, 5, 5, 49, 33)[:, 1:, 1:, 1:, 1:]

    found = compile_one(RUNS[name][0], Tensors(layout=strided), 90, tmp_path)
    assert found.spilled == 0 and found.shared <= SHARED and ".f64" not in found.ptx


def test_ticket_orders_the_partial_sums(tmp_path: Path) -> None:
    """Store, barrier, one acquire-release ticket and nothing else atomic, then reads past the first-level cache."""
    for name, tickets in (("log_prob", 1), ("loss with options", 2)):
        ptx = compile_one(RUNS[name][0], Tensors(), 90, tmp_path).ptx
        atomics = re.findall(r"\b(?:atom|red)\.\S+", ptx)
        assert atomics == ["atom.global.gpu.acq_rel.add.u32"] * tickets
        before, after = ptx.split("atom.", 1)
        assert "bar.sync" in before[before.rindex("st.global") :]
        assert "ld.global.cg" not in before and "ld.global.cg" in after


def test_lengths_and_settings_do_not_compile_again(tmp_path: Path) -> None:
    """Neither batch, sample length, step, seed nor clip range is part of what is compiled."""
    table = Tensors().call().table

    def call(batch: int, numel: int, step: int, seed: int) -> None:
        latents, output, out = (torch.empty(batch, numel, dtype=dtype) for dtype in MIXES[0])
        given = Transition(latents, output, out, None, 1.0, table, None, step, False, "triton")
        _triton.sample(given, Noise(None, seed, None), torch.empty(batch), None)

    calls = ((3, 4096, 1, 1), (7, 806_400, 0, 2**62), (16, 48, 3, 2**31))
    offline.assert_compiled_once(tmp_path, [kernels.sample_kernel], (partial(call, *each) for each in calls))
