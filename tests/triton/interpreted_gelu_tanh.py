"""GELU by Triton against the definition.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.kernels.gelu_tanh import reference
from dancegrpo_fast.ops import _triton_gated_residual
from dancegrpo_fast.ops import _triton_gelu_tanh as launcher
from dancegrpo_fast.ops.gelu_linear import gelu_linear
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh

from ..ops.cases import BF16, F16, F32, F64
from ..release import release_but
from ..tolerances import assert_within_budget
from .guards import assert_filled, assert_same_bits, guarded

DTYPES = (BF16, F16, F32)
BLOCK = launcher.BLOCK
# One element, primes, around a block.
SHAPES = ((1,), (7, 13), (3, BLOCK - 1), (1, BLOCK), (2, 3, BLOCK + 1), (2, 5, 72))
FAR = 2**31
WIDE = launcher.ROWS_BLOCK
GRADIENT_SHAPES = ((1,), (7, 13), (2, WIDE - 1), (3, WIDE + 1), (2, 5, 72))


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (3.0 * torch.randn(shape, generator=g)).to(dtype)


def run(x: Tensor, prefix: Tensor | None, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, prefix)]
    out = gelu_tanh(leaves[0], prefix=leaves[1], backend=backend)
    grad = numbers(tuple(out.shape), x.dtype, 1).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def assert_matches_reference(x: Tensor, prefix: Tensor | None = None) -> None:
    found, plain, truth = run(x, prefix, "triton"), run(x, prefix, "reference"), run(x, prefix, "reference", F64)
    for actual, like, right in zip(found, plain, truth, strict=True):
        assert_within_budget(actual, right, like)
    if prefix is not None:
        assert_same_bits([found[0][..., : prefix.shape[-1]]], [prefix])


@pytest.mark.parametrize("dtype", release_but((BF16,), DTYPES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = numbers(shape, dtype)
    assert_matches_reference(x)
    for width in (1, 40, BLOCK + 3):
        assert_matches_reference(x, numbers((*shape[:-1], width), dtype, 2))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda t: t.chunk(3, -1)[1],
    "transposed": lambda t: t.transpose(0, 2),
    "expanded": lambda t: t[:1].expand_as(t),
    "every third": lambda t: t[..., ::3],
    "matrices": lambda t: t.mT,
}


@pytest.mark.parametrize("view", release_but(("chunk", "every third"), VIEWS))
def test_views(view: str) -> None:
    x = VIEWS[view](numbers((2, 3, 2, 3 * 4), BF16))
    assert_matches_reference(x)
    prefix = numbers((*x.shape[:-1], 2 * 5), BF16, 3)[..., ::2]
    assert_matches_reference(x, prefix)
    assert_same_bits(run(x, prefix, "triton"), run(x.contiguous(), prefix.contiguous(), "triton"))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_far_from_zero(dtype: torch.dtype) -> None:
    """Not a number only where torch has none either."""
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([1e4, 1e9, 1e15, 1e30]), -torch.logspace(0, 30, 31)])
    x = x.to(dtype)
    finite = x.abs() < 1e18
    assert_matches_reference(x[finite])
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 0.0, -0.0], dtype=dtype)
    found, plain = (run(torch.cat([x, special]), None, backend) for backend in ("triton", "reference"))
    for actual, like in zip(found, plain, strict=True):
        assert not bool((actual.isnan() & ~like.isnan()).any())
    assert found[0][-7] == float("inf") and bool(found[0][-5].isnan()) and bool(found[1][-5].isnan())
    assert torch.equal(found[0][-2:].signbit(), plain[0][-2:].signbit())


@pytest.mark.parametrize("width", [0, 5])
def test_writes_everything_and_nothing_else(width: int) -> None:
    x, grad = numbers((3, 7), BF16), numbers((3, 7), BF16, 1)
    prefix = numbers((3, width), BF16, 2) if width else None
    rooms = [guarded((3, width + 7), BF16), guarded((3, 7), BF16)]
    launcher.forward(x, prefix, rooms[0][0])
    launcher.backward(grad, x, rooms[1][0])
    assert_filled(rooms)


def test_far_rows() -> None:
    """Rows more than 2^31 elements apart."""
    x = numbers((2, 24), BF16)
    far = torch.empty(FAR + 24, dtype=BF16).as_strided((2, 24), (FAR, 1)).copy_(x)
    assert_same_bits(run(far, None, "triton"), run(x, None, "triton"))


def gradients(grad: Tensor, x: Tensor, prefix: Tensor | None, bias: bool, backend: str) -> list[Tensor]:
    """Activation, gradient and its sum over rows."""
    return list(torch.ops.dgf.gelu_tanh_gradients(grad, x, prefix, bias, "fast", backend))[: 3 if bias else 2]


def assert_gradients_match(grad: Tensor, x: Tensor, prefix: Tensor | None) -> None:
    found, plain = (gradients(grad, x, prefix, True, backend) for backend in ("triton", "reference"))
    truth = gradients(grad.double(), x.double(), None if prefix is None else prefix.double(), True, "reference")
    for actual, like, right in zip(found, plain, truth, strict=True):
        assert_within_budget(actual, right, like)
    # What the forward and the plain gradient give, bit for bit.
    assert_same_bits(found[:1], [torch.ops.dgf.gelu_tanh(x, prefix, "fast", "triton")])
    assert_same_bits(found[1:2], [torch.ops.dgf.gelu_tanh_backward(grad, x, "fast", "triton")])
    assert_same_bits(gradients(grad, x, prefix, False, "triton"), found[:2])


@pytest.mark.parametrize("dtype", release_but((BF16,), DTYPES), ids=str)
@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
def test_gradients_match_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = numbers(shape, dtype)
    assert_gradients_match(numbers(shape, dtype, 1), x, None)
    joint = numbers((*shape[:-1], shape[-1] + 40), dtype, 1)
    assert_gradients_match(joint[..., 40:], x, numbers((*shape[:-1], 40), dtype, 2))


@pytest.mark.parametrize("rows", release_but((11,), [11, 12, 13]))
def test_gradients_of_longer_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton_gated_residual, "CHUNKS", 2)
    assert_gradients_match(numbers((rows, 3), BF16, 1), numbers((rows, 3), BF16), numbers((rows, 2), BF16, 2))


@pytest.mark.parametrize("view", release_but(("chunk", "every third"), VIEWS))
def test_gradients_of_views(view: str) -> None:
    x, given = (VIEWS[view](numbers((2, 3, 2, 3 * 4), BF16, seed)) for seed in (0, 1))
    prefix = numbers((*x.shape[:-1], 2 * 5), BF16, 3)[..., ::2]
    assert_gradients_match(given, x, prefix)
    whole = gradients(given.contiguous(), x.contiguous(), prefix.contiguous(), True, "triton")
    assert_same_bits(gradients(given, x, prefix, True, "triton"), whole)


def test_gradients_of_far_rows() -> None:
    x, given = numbers((2, 24), BF16), numbers((2, 24), BF16, 1)
    far = torch.empty(FAR + 24, dtype=BF16).as_strided((2, 24), (FAR, 1)).copy_(x)
    assert_same_bits(gradients(given, far, None, True, "triton"), gradients(given, x, None, True, "triton"))


@pytest.mark.parametrize("width", [0, 5])
def test_gradients_write_everything_and_nothing_else(width: int) -> None:
    x, grad = numbers((9, 7), BF16), numbers((9, 7), BF16, 1)
    prefix = numbers((9, width), BF16, 2) if width else None
    rooms = [guarded(shape, BF16) for shape in ((9, width + 7), (9, 7), (7,))]
    launcher.gradients(grad, x, prefix, *(inside for inside, _ in rooms))
    assert_filled(rooms)


@pytest.mark.parametrize("mode", ["fast", "lossless"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_projection_end_to_end(dtype: torch.dtype, mode: str) -> None:
    """Through autograd, against eager torch; lossless to the bit, in rows of whole vectors of the CPU."""
    shapes = ((2, 5, 64), (2, 5, 32), (6, 96), (6,), (64,))
    given = [numbers(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    grad = numbers((2, 5, 6), dtype, 9)

    def run_projection(by: str, kind: torch.dtype) -> list[Tensor]:
        x, prefix, weight, bias, h_bias = leaves = [t.detach().to(kind).requires_grad_() for t in given]
        if by == "eager":
            out = torch.nn.functional.linear(reference.definition(x + h_bias, prefix), weight, bias)
        else:
            out = gelu_linear(x + h_bias.detach(), weight, bias, prefix=prefix, h_bias=h_bias, mode=mode, backend=by)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))]

    found, plain, truth = run_projection("triton", dtype), run_projection("eager", dtype), run_projection("eager", F64)
    for actual, right, like in zip(found, truth, plain, strict=True):
        assert_within_budget(actual, right, like)
    if mode == "lossless":
        assert_same_bits(found, plain)
