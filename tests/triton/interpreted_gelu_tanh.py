"""GELU by Triton against the definition.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops import _triton_gelu_tanh as launcher
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh

from ..ops.cases import BF16, F16, F32, F64, bits
from ..tolerances import assert_within_budget

DTYPES = (BF16, F16, F32)
BLOCK = launcher.BLOCK
# One element, primes, around a block.
SHAPES = ((1,), (7, 13), (3, BLOCK - 1), (1, BLOCK), (2, 3, BLOCK + 1), (2, 5, 72))
FAR = 2**31


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (3.0 * torch.randn(shape, generator=g)).to(dtype)


def run(x: Tensor, prefix: Tensor | None, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, prefix)]
    out = gelu_tanh(leaves[0], prefix=leaves[1], backend=backend)
    grad = numbers(tuple(out.shape), x.dtype, 1).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert [bits(t.detach()) for t in found] == [bits(t.detach()) for t in wanted]


def assert_matches_reference(x: Tensor, prefix: Tensor | None = None) -> None:
    found, plain, truth = run(x, prefix, "triton"), run(x, prefix, "reference"), run(x, prefix, "reference", F64)
    for actual, like, right in zip(found, plain, truth, strict=True):
        assert_within_budget(actual, right, like)
    if prefix is not None:
        assert_same_bits([found[0][..., : prefix.shape[-1]]], [prefix])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = numbers(shape, dtype)
    assert_matches_reference(x)
    for width in (1, 40, BLOCK + 3):
        assert_matches_reference(x, numbers((*shape[:-1], width), dtype, 2))


def test_views() -> None:
    wide = numbers((2, 3, 2, 3 * 8), BF16)
    for x in (wide.chunk(3, -1)[1], wide.transpose(0, 2), wide[:1].expand_as(wide), wide[..., ::3], wide.mT):
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
    for shape in ((3, width + 7), (3, 7)):
        room = torch.full((shape[0] * shape[1] + 64,), float("nan"), dtype=BF16)
        inside = room[32:-32].view(shape)
        if shape[1] == 7 and width:
            launcher.backward(grad, x, inside)
        else:
            launcher.forward(x, prefix, inside)
        assert bool(room[:32].isnan().all() and room[-32:].isnan().all()) and not bool(inside.isnan().any())


def test_far_rows() -> None:
    """Rows more than 2^31 elements apart."""
    x = numbers((2, 24), BF16)
    far = torch.empty(FAR + 24, dtype=BF16).as_strided((2, 24), (FAR, 1)).copy_(x)
    assert_same_bits(run(far, None, "triton"), run(x, None, "triton"))
