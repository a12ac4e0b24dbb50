"""Norm and modulation by Triton against the definition.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops import _triton_norm_modulate as launcher
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate_fanout

from ..ops.cases import BF16, F16, F32, F64, assert_same_bits, bits, dtype_id
from ..release import release_but
from ..tolerances import assert_within_budget
from .guards import assert_filled, guarded

NAMES = ("x", "y", "gate", "scale", "shift", "weight", "bias", "y_bias")
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """Every tensor of a call; `split` is -1 where parameters have no segments."""

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    y_bias: Tensor | None
    grads: tuple[Tensor, Tensor]
    split: int = -1
    norm: str = "layer"
    norm_dtype: torch.dtype | None = None

    def select(self, sample: int) -> "Case":
        """One sample of the batch."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {n: t[sample : sample + 1] for n, t in given.items() if isinstance(t, Tensor) and t.ndim == 3}
        return replace(self, **own, grads=tuple(g[sample : sample + 1] for g in self.grads))


def make_case(
    shape: tuple[int, int, int] = (2, 7, 72),
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    *,
    rows: tuple[int, int] = (1, 1),
    split: int = -1,
    gated: bool = True,
    modulated: bool = True,
    affine: bool = False,
    seed: int = 0,
    **settings,
) -> Case:
    """Random tokens and parameters, `rows` of gate and of scale and shift, in two dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=F64).to(dtype)

    batch, _, channels = shape
    token, parameter = dtypes

    def row(count: int) -> Tensor:
        return draw(batch, count, channels, dtype=parameter)

    return Case(
        x=draw(*shape, dtype=token) + 0.5,
        y=draw(*shape, dtype=token) if gated else None,
        gate=row(rows[0]) if gated else None,
        scale=row(rows[1]) if modulated else None,
        shift=row(rows[1]) if modulated else None,
        weight=draw(channels, dtype=parameter) if affine else None,
        bias=draw(channels, dtype=parameter) if affine else None,
        y_bias=draw(channels, dtype=token) if gated else None,
        grads=(draw(*shape, dtype=token), draw(*shape, dtype=token)),
        split=split,
        **settings,
    )


def run(case: Case, mode: str, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The public op and all its gradients; `dtype` replaces that of all tensors."""
    given = {name: value for name in NAMES if (value := getattr(case, name)) is not None}
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in given.items()}
    grads = [g.to(dtype or g.dtype) for g in case.grads]
    settings = {"norm": case.norm, "eps": EPS, "mode": mode, "norm_dtype": case.norm_dtype, "backend": backend}
    settings |= {"split": None if case.split < 0 else case.split} | ({"consumers": 1} if case.y is None else {})
    op = norm_modulate_fanout if case.y is None else gated_residual_norm_modulate
    outputs = op(**leaves, **settings)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"h": outputs[0].detach(), "out": outputs[1].detach(), **named}


def assert_matches(case: Case, mode: str) -> None:
    """Everything within the budget of plain torch in the same dtypes."""
    mine, plain = run(case, mode, "triton"), run(case, "lossless", "reference")
    truth = run(replace(case, norm_dtype=None), "fast", "reference", F64)
    for name, value in mine.items():
        assert_within_budget(value, truth[name], plain[name])


@pytest.mark.pairs
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("mode", ["fast", "lossless"])
@pytest.mark.parametrize(
    "dtypes",
    release_but(
        ((BF16, BF16), (BF16, F32)), [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, BF16)]
    ),
    ids=dtype_id,
)
def test_every_dtype(dtypes: tuple, mode: str, norm: str) -> None:
    assert_matches(make_case(dtypes=dtypes, norm=norm, affine=True), mode)


LAYOUTS = {
    "per token": {"rows": (7, 7)},
    "mixed": {"rows": (1, 7)},
    "segments": {"rows": (2, 2), "split": 3},
    "one segment": {"rows": (2, 2), "split": 0},
    "the other segment": {"rows": (2, 2), "split": 7},
    "no modulation": {"modulated": False, "affine": True},
    "no gate": {"gated": False},
    "nothing but the norm": {"gated": False, "modulated": False},
}


@pytest.mark.parametrize("layout", release_but(("segments", "no gate"), LAYOUTS))
@pytest.mark.parametrize("mode", release_but(("lossless",), ["fast", "lossless"]))
def test_every_layout(mode: str, layout: str) -> None:
    assert_matches(make_case(**LAYOUTS[layout]), mode)


SHAPES = (1, 1, 72), (3, 13, 5), (1, 5, 1), (2, 3, 129), (1, 9, 64), (1, 2, 3072)


@pytest.mark.parametrize("shape", release_but((SHAPES[1], SHAPES[3]), SHAPES), ids=str)
def test_every_shape(shape: tuple[int, int, int]) -> None:
    assert_matches(make_case(shape, affine=True), "fast")


@pytest.mark.parametrize("mode", release_but(("lossless",), ["fast", "lossless"]))
def test_norm_in_float32(mode: str) -> None:
    """`norm(x.float())` and float32 parameters beside bfloat16 tokens."""
    assert_matches(make_case(dtypes=(BF16, F32), norm_dtype=F32, norm="rms"), mode)


MORE: list[Any] = [((F16, F16), None), ((BF16, F32), None), ((F32, BF16), BF16)]


@pytest.mark.parametrize("rows", release_but((7,), [1, 7]))
@pytest.mark.parametrize(
    ("dtypes", "norm_dtype"),
    [
        ((BF16, BF16), None),
        ((BF16, BF16), F32),
        *(pytest.param(*more, marks=pytest.mark.release) for more in MORE),
    ],
    ids=str,
)
def test_lossless_is_eager_torch_to_the_bit(dtypes: tuple, norm_dtype: torch.dtype | None, rows: int) -> None:
    """RMSNorm, which eager torch computes on a CPU in the kernel's order of operations; sums differ in order."""
    case = make_case(dtypes=dtypes, norm="rms", rows=(rows, rows), norm_dtype=norm_dtype)
    mine, eager = (run(case, "lossless", backend) for backend in ("triton", "reference"))
    for name, value in mine.items():
        if rows == 7 or name in ("h", "out", "grad y_bias"):
            assert bits(value) == bits(eager[name]), name


@pytest.mark.parametrize("mode", ["fast", "lossless"])
@pytest.mark.parametrize("count", release_but((5,), [2, 5, 7]))
def test_gradients_of_consumers(count: int, mode: str) -> None:
    """Added in autograd's order, whatever their strides; more than the kernel takes are added before."""
    case = make_case(gated=False, norm="rms", rows=(1, 7))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(case.x.shape, generator=generator).to(BF16) for _ in range(count)]
    grads[0] = grads[0].transpose(1, 2).contiguous().transpose(1, 2)

    def gradients(backend: str, dtype: torch.dtype, how: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (case.x, case.scale, case.shift)]
        settings = {"norm": "rms", "consumers": count, "mode": how, "backend": backend}
        outputs = norm_modulate_fanout(*leaves, **settings)[1:]
        return list(torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads]))

    mine, plain = gradients("triton", BF16, mode), gradients("reference", BF16, "lossless")
    for value, truth, eager in zip(mine, gradients("reference", F64, "fast"), plain, strict=True):
        assert_within_budget(value, truth, eager)
        if mode == "lossless":
            assert bits(value) == bits(eager)


def test_views() -> None:
    """Chunks of one projection, slices of a joint buffer, expanded and transposed tensors: the same bits."""
    case = make_case((2, 7, 72))
    joint = torch.full((2, 12, 72), float("nan"), dtype=BF16)
    joint[:, 5:] = case.x
    six = torch.full((2, 6 * 72), float("nan"), dtype=BF16)
    six[:, 72:144], six[:, 144:216], six[:, 360:] = (t[:, 0] for t in (case.gate, case.scale, case.shift))
    pieces = [t.unsqueeze(1) for t in six.chunk(6, dim=1)]
    transposed = case.y.transpose(1, 2).contiguous().transpose(1, 2)
    viewed = replace(case, x=joint[:, 5:], y=transposed, gate=pieces[1], scale=pieces[2], shift=pieces[5])
    ones = case.grads[0][:1, :1].expand(2, 7, 72)
    for grads in (case.grads, (ones, ones)):
        wanted = run(replace(case, grads=tuple(g.contiguous() for g in grads)), "fast", "triton")
        assert_same_bits(run(replace(viewed, grads=grads), "fast", "triton"), wanted)


@pytest.mark.parametrize("split", release_but((3,), [-1, 3]))
def test_a_sample_does_not_see_its_batch(split: int) -> None:
    case = make_case((3, 7, 40), rows=(1, 1) if split < 0 else (2, 2), split=split)
    together = run(case, "fast", "triton")
    for sample in range(3):
        for name, value in run(case.select(sample), "fast", "triton").items():
            assert name == "grad y_bias" or bits(value[0]) == bits(together[name][sample]), name


@pytest.mark.parametrize("rows", release_but((7,), [1, 7]))
def test_all_of_an_output_and_nothing_else_is_written(rows: int) -> None:
    case = make_case((2, 7, 72), affine=True, rows=(rows, rows))
    given = {name: getattr(case, name) for name in NAMES}
    settings = (-1, "layer", EPS, "fast", None)
    outputs = [guarded(s, t) for s, t in (((2, 7, 72), BF16), ((2, 7, 72), BF16), ((2, 7), F32), ((2, 7), F32))]
    values = launcher.Given(*list(given.values())[2:7], *settings)
    launcher.forward(case.x, case.y, values, tuple(o for o, _ in outputs))
    h, _, mean, rstd = (o for o, _ in outputs)
    grads = [guarded(value.shape, value.dtype) for value in given.values()]
    launcher.backward(case.grads[0], [case.grads[1]], h, mean, rstd, case.y, values, [o for o, _ in grads])
    assert_filled([*outputs, *grads])


@pytest.mark.parametrize("affine", release_but((True,), [False, True]))
def test_what_is_not_wanted_is_not_written(affine: bool) -> None:
    case = make_case(affine=affine)
    wanted = run(case, "fast", "triton")
    out, mean, rstd = wanted["out"], torch.empty(2, 7), torch.empty(2, 7)
    given = [getattr(case, name) for name in NAMES]
    values = launcher.Given(*given[2:7], -1, "layer", EPS, "fast", None)
    launcher.forward(*given[:2], values, (torch.empty_like(out), torch.empty_like(out), mean, rstd))
    for index, name in enumerate(NAMES):
        # Among many other sums that of the bias is torch's.
        if given[index] is None or (affine and name == "y_bias"):
            continue
        outputs: list[Tensor | None] = [None] * len(NAMES)
        outputs[index] = torch.empty_like(given[index])
        y = case.y if name == "gate" else None
        launcher.backward(case.grads[0], [case.grads[1]], wanted["h"], mean, rstd, y, values, outputs)
        assert bits(outputs[index]) == bits(wanted[f"grad {name}"]), name


def test_batch_strides_beyond_32_bits() -> None:
    case = make_case((2, 2, 40), gated=False)
    far = torch.empty(2**31 + 4096, dtype=BF16).as_strided((2, 2, 40), (2**31 + 64, 40, 1))
    far.copy_(case.x)
    wanted = run(case, "fast", "triton")
    assert_same_bits(run(replace(case, x=far), "fast", "triton"), wanted)


def test_long_rows_of_float32_take_two_launches() -> None:
    assert_matches(make_case((1, 3, 72), (F32, F32), affine=True), "fast")
    assert len(launcher._launches([torch.empty(1)] * 8, False)) == 2


def test_without_y_the_gate_has_the_sum_of_the_residual() -> None:
    case = make_case((2, 7, 72))
    wanted = run(case, "fast", "triton")
    values = launcher.Given(case.gate.float(), case.scale, case.shift, None, None, -1, "layer", EPS, "fast", None)
    out, mean, rstd = wanted["out"], torch.empty(2, 7), torch.empty(2, 7)
    launcher.forward(case.x, case.y, values, (torch.empty_like(out), torch.empty_like(out), mean, rstd))
    outputs: list[Tensor | None] = [torch.empty_like(case.x), None, torch.empty(2, 1, 72), *[None] * 5]
    launcher.backward(case.grads[0], [case.grads[1]], wanted["h"], mean, rstd, None, values, outputs)
    truth = run(case, "fast", "reference", F64)["grad x"].sum(1, keepdim=True)
    assert_within_budget(outputs[2], truth, outputs[0].float().sum(1, keepdim=True))


def test_float64_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        run(make_case(norm_dtype=F64), "lossless", "triton")
