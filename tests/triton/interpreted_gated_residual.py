"""The gated residual by Triton against the definition.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops import _triton_gated_residual as launcher
from dancegrpo_fast.ops.gated_residual import gated_residual

from ..ops.cases import BF16, F16, F32, F64, bits, dtype_id
from ..release import release_but
from ..tolerances import assert_within_budget
from .guards import assert_filled, assert_same_bits, guarded

MIXES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, BF16, F32), (F32, BF16, BF16), (F16, BF16, F32)]
LAYOUTS = {"sample": (1, -1), "token": (7, -1), "segments": (2, 3), "one segment": (2, 0), "the other": (2, 7)}


def make(shape: tuple[int, int, int], dtypes: tuple = (BF16, BF16, BF16), rows: int = 1) -> list[Tensor]:
    """x, y, gate and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape, (shape[0], rows, shape[2]), shape)
    drawn = (torch.randn(s, generator=generator, dtype=F64) for s in shapes)
    return [t.to(dtype) for t, dtype in zip(drawn, (*dtypes, dtypes[0]), strict=True)]


def run(tensors: list[Tensor], split: int, mode: str, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result and the gradients of x, y, the gate, and the bias of what made y."""
    *leaves, grad = (t.detach().to(dtype or t.dtype) for t in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    leaves.append(torch.zeros(leaves[1].shape[2], dtype=leaves[1].dtype, requires_grad=True))
    out = gated_residual(*leaves[:3], y_bias=leaves[3], split=None if split < 0 else split, mode=mode, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_matches(tensors: list[Tensor], split: int, mode: str) -> None:
    """Within the budget of plain torch, and lossless to the bit where nothing is summed."""
    mine, plain = (run(tensors, split, how, by) for how, by in ((mode, "triton"), ("lossless", "reference")))
    truth = run(tensors, split, "fast", "reference", F64)
    for value, want, eager in zip(mine, truth, plain, strict=True):
        assert_within_budget(value, want, eager)
    if mode == "lossless":
        elementwise = 4 if tensors[2].shape[1] == tensors[0].shape[1] and split < 0 else 2
        assert_same_bits(mine[:elementwise], plain[:elementwise])


@pytest.mark.parametrize("mode", ["fast", "lossless"])
@pytest.mark.parametrize("dtypes", MIXES, ids=dtype_id)
def test_every_dtype(dtypes: tuple, mode: str) -> None:
    assert_matches(make((2, 7, 72), dtypes), -1, mode)


@pytest.mark.parametrize("mode", release_but(("lossless",), ["fast", "lossless"]))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, mode: str) -> None:
    rows, split = LAYOUTS[layout]
    assert_matches(make((3, 7, 72), rows=rows), split, mode)


MOST = [(1, 1, 1), (3, 13, 5), (1, 9, 64), (2, 2, 1025)]


@pytest.mark.parametrize("shape", release_but(MOST, [*MOST, (1, 530, 3)]), ids=str)
def test_every_shape(shape: tuple[int, int, int]) -> None:
    assert_matches(make(shape), -1, "fast")


def test_views_and_batches() -> None:
    """Slices, transposed and expanded tensors, a batch stride past 32 bits, and any batch: the same bits."""
    x, y, gate, grad = make((2, 7, 72))
    joint = torch.full((2, 9, 72), float("nan"), dtype=BF16)
    joint[:, 2:] = x
    six = torch.full((2, 6 * 72), float("nan"), dtype=BF16)
    six[:, 72:144] = gate[:, 0]
    far = torch.empty(2**31 + 4096, dtype=BF16).as_strided((2, 7, 72), (2**31 + 64, 72, 1))
    far.copy_(grad)
    strided = [joint[:, 2:], y.transpose(1, 2).contiguous().transpose(1, 2), six.chunk(6, dim=1)[1].unsqueeze(1), far]
    wanted = run([x, y, gate, grad], -1, "fast", "triton")
    assert_same_bits(run(strided, -1, "fast", "triton"), wanted)
    for sample in range(2):
        alone = run([t[sample : sample + 1] for t in (x, y, gate, grad)], -1, "fast", "triton")
        assert_same_bits([value[0] for value in alone[:4]], [want[sample] for want in wanted[:4]])
    ones = grad[:1, :1, :1].expand(2, 7, 72)
    assert_same_bits(*(run([x, y, gate, given], -1, "fast", "triton") for given in (ones, ones.contiguous())))


def test_all_of_an_output_and_nothing_else_is_written() -> None:
    x, y, gate, grad = make((2, 7, 72))
    rooms = [guarded(t.shape, BF16) for t in (x, y, gate, x[0, 0])]
    out, grad_y, grad_gate, grad_bias = (inside for inside, _ in rooms)
    launcher.forward(x, y, gate, -1, "fast", out)
    launcher.backward(grad, y, gate, -1, "fast", [grad_y, grad_gate, grad_bias])
    assert_filled(rooms)
    alone, alone_bias = torch.empty_like(y), torch.empty_like(grad_bias)
    launcher.backward(grad, None, gate, -1, "fast", [alone, None, None])
    launcher.backward(grad, None, gate, -1, "fast", [None, None, alone_bias])
    assert bits(alone) == bits(grad_y) and bits(alone_bias) == bits(grad_bias)
