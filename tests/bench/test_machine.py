"""Machine code followed by bench.machine: what opcodes compute, how loops count, and that no kernel gets worse."""

import struct

import numpy as np
import pytest

pytest.importorskip("triton")

from bench.machine.__main__ import OUT, row, table
from bench.machine.cases import Case, cases
from bench.machine.chips import CHIPS, places, predict
from bench.machine.code import Instruction, instruction
from bench.machine.launches import nvcc_version
from bench.machine.path import follow
from bench.machine.semantics import run
from bench.machine.warp import LANES, UnknownError, Warp, as_float
from bench.rows import read
from dancegrpo_fast import backends

from ..tolerances import WORSE
from ..triton import offline

pytestmark = pytest.mark.skipif(backends.interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled")


def code(text: str) -> list[Instruction]:
    """Lines one after the other, 16 bytes each."""
    return [instruction(16 * number, line.strip()) for number, line in enumerate(text.strip().splitlines())]


def warp(arguments: bytes = b"", program: int = 5, number: int = 1) -> Warp:
    return Warp(90, arguments, program, number, 64, {})


def after(text: str, **registers: int) -> Warp:
    """A warp in which these instructions ran."""
    state = warp()
    for name, value in registers.items():
        state.registers["R"][int(name[1:])] = np.full(LANES, value & 0xFFFFFFFF, dtype=np.uint64)
    for one in code(text):
        run(state, one)
    return state


def word(state: Warp, index: int) -> int:
    return int(state.registers["R"][index][0])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("IADD3 R0, R1, -R2, RZ", 7 - 9),
        ("IADD3 R0, P0, R1, R3, R3\nIADD3.X R0, R1, RZ, RZ, P0, !PT", 7 + 1),
        ("IADD3 R4, P0, RZ, -R1, RZ\nIMAD.X R0, RZ, RZ, ~RZ, P0", -1),
        ("IMAD R0, R1, R2, 0x5", 7 * 9 + 5),
        ("IMAD.HI.U32 R0, R3, R2, RZ", 0xFFFFFFFF * 9 >> 32),
        ("IMAD.WIDE.U32 R4, R3, R3, RZ\nMOV R0, R5", 0xFFFFFFFE),
        ("IMAD.WIDE R4, R3, R2, RZ\nMOV R0, R5", -1),
        ("LEA R0, R1, R2, 0x4", (7 << 4) + 9),
        ("LEA.HI R0, R3, R2, RZ, 0x1", 9 + 1),
        ("SHF.R.S32.HI R0, RZ, 0x1, R3", -1),
        ("SHF.R.U32.HI R0, RZ, 0x1, R3", 0x7FFFFFFF),
        ("SHF.L.U64.HI R0, R3, 0x4, R1", (7 << 4) + 15),
        ("LOP3.LUT R0, R1, R2, RZ, 0x3c, !PT", 7 ^ 9),
        ("ISETP.LT.U32.AND P0, PT, R1, R3, PT\nSEL R0, R1, R2, P0", 7),
        ("ISETP.LT.AND P0, PT, R1, R3, PT\nSEL R0, R1, R2, P0", 9),
        ("ISETP.GE.AND P0, P1, R1, R2, PT\nSEL R0, R1, R2, P1", 7),
        ("PRMT R0, R1, 0x3240, R2", 7 | 9 << 8),
        ("PRMT R0, R1, 0x7632, R2", 0),
        ("P2R R0, PR, RZ, 0x0", 0),
        ("SGXT.U32 R0, R3, 0x4", 15),
        ("VIADDMNMX R0, R1, R2, 0xa, PT", 10),
        ("IABS R0, R3", 1),
        ("I2F.RP R4, R1\nMUFU.RCP R5, R4\nFMUL R5, R5, 21\nF2I.FTZ.U32.TRUNC.NTZ R0, R5", 3),
        ("HFMA2.MMA R0, -RZ, RZ, 1.875, 0", 0x3F800000),
        ("STS [R1+0x11], R2\nLDS R0, [0x18]", 9),
        ("STL.64 [R1+0x8], R2\nLDL.LU R0, [R1+0xc]", -1),
    ],
    ids=lambda value: str(value).partition("\n")[0],
)
def test_what_opcodes_compute(text: str, wanted: int) -> None:
    assert word(after(text, R1=7, R2=9, R3=-1), 0) == wanted & 0xFFFFFFFF


def test_floats_are_32_bit() -> None:
    state = after("FFMA R0, R1, 2, -R1\nFSETP.GT.AND P0, PT, |R0|, 1, PT", R1=0x40400000)
    assert as_float(state.registers["R"][0])[0] == 3.0 and state.predicates["P"][0].all()


LOOP = """
MOV R2, RZ
ULDC UR4, c[0x0][0x210]
IADD3 R2, R2, 0x1, RZ
MUFU.EX2 R3, R3
ISETP.LT.AND P0, PT, R2, UR4, PT
@P0 BRA 0x20
EXIT
"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    issued = follow(code(LOOP), warp(struct.pack("<i", 12)))
    assert issued.instructions == 2 + 4 * 12 + 1
    assert issued.units["xu"] == 12 and issued.units["alu"] == 2 * 12


def test_lanes_that_part_meet_again() -> None:
    """Both sides are issued where lanes differ, one where they do not."""
    text = """
    S2R R0, SR_TID.X
    ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT
    @P0 BRA 0x50
    LDG.E.128 R4, [R2.64]
    BRA 0x60
    LDG.E R4, [R2.64]
    EXIT
    """
    # The warp's threads are 32 to 63.
    for first, wanted, moved in ((0, 5, 32 * 4), (40, 7, 8 * 16 + 24 * 4), (64, 6, 32 * 16)):
        issued = follow(code(text), warp(struct.pack("<i", first)))
        assert (issued.instructions, issued.bytes) == (wanted, moved)


def test_a_branch_on_what_is_not_known_is_an_error() -> None:
    with pytest.raises(UnknownError, match="0x10 BRA: its guard"):
        follow(code("DSETP.GT.AND P0, PT, R0, R2, PT\n@P0 BRA 0x0\nEXIT"), warp())


def test_programs_on_a_multiprocessor() -> None:
    assert places(90, 256, 42, 0) == 5
    assert places(90, 512, 64, 32916) == 2
    assert places(90, 512, 109, 49300) == 1
    assert places(89, 128, 16, 0) == 12


def test_prediction() -> None:
    """Issue, unit and bytes of a launch that is easily counted by hand."""
    chip = next(chip for chip in CHIPS if chip.name == "H200")
    found = predict(chip, 1066, 4, 1980.0, {"xu": 100.0, "alu": 500.0}, 4320)
    assert found.issue_us == pytest.approx(9 * 1980 / 4 / 1980)
    assert (found.unit, found.unit_us) == ("alu", pytest.approx(9 * 1000 / 4 / 1980))
    assert found.byte_us == pytest.approx(1e-3) and 2.01 < found.waves < 2.02
    assert 0 < found.least < found.most < 1


KNOWN = {(r["case"], r["shape"], r["launch"], r["architecture"]): r for r in read(OUT)}
# One of each kernel, the longest loops left out.
QUICK = (
    "norm forward, HunyuanVideo",
    "gated residual forward, HunyuanVideo",
    "gelu backward, HunyuanVideo",
    "seeded step, Triton, float32, outputs bfloat16",
)


def kept() -> list:
    found = []
    for architecture in (80, 89, 90, 100, 120):
        for case in cases(cuda=True):
            if (case.name, case.shape, 0, architecture) in KNOWN:
                quick = architecture == 90 and case.id in QUICK
                marks = () if quick else pytest.mark.release
                found.append(pytest.param(case, architecture, marks=marks, id=f"{architecture} {case.id}"))
    return found


@pytest.mark.parametrize(("case", "architecture"), kept())
def test_no_kernel_gets_worse(case: Case, architecture: int) -> None:
    """Than the committed results, with the compilers that made them."""
    before = KNOWN[case.name, case.shape, 0, architecture]
    if "CUDA" in case.name and nvcc_version() != before["environment"]["nvcc"]:
        pytest.skip(f"counted with nvcc {before['environment']['nvcc']}")
    if "CUDA" not in case.name and not offline.PINNED:
        pytest.skip("counted with the pinned Triton")
    for number, launch in enumerate(case.launches(architecture)):
        before, now = KNOWN[case.name, case.shape, number, architecture], row(case, launch, number)
        for key in ("instructions", "registers", "spilled_bytes", "shared_bytes"):
            assert now[key] <= before[key] * WORSE, f"{launch.kernel}: {key} {now[key]}, was {before[key]}"


def test_every_kernel_is_in_the_results() -> None:
    """All Triton kernels, and the CUDA ones, for each GPU; and each is stamped for what it is."""
    rows = list(KNOWN.values())
    assert {r["stamp"] for r in rows} == {"predicted"}
    kernels = {(r["op"], r["kernel"]) for r in rows}
    assert {k for _, k in kernels} >= {
        *("forward_kernel", "backward_kernel", "sum_kernel", "gradients_kernel", "sum_chunks_kernel"),
        *("sample_kernel", "log_prob_kernel", "gradient_kernel", "policy_loss_kernel"),
        *("transition_sample_kernel", "transition_log_prob_kernel", "transition_gradient_kernel"),
        "usual_sample_kernel",
    }
    assert {r["architecture"] for r in rows} == {80, 89, 90, 100, 120}
    for chip in CHIPS:
        assert len(table(rows, chip.name)) > len(QUICK)
