"""Block ops on a device: their self checks, and sums that do not depend on where operands lie.

Where there is no GPU the same bodies run on the reference, which is not compared with itself.
"""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops import selfcheck

from ..ops.cases import BF16, F32, dtype_id
from .targets import Target
from .test_block_ops import (
    ON_GPU,
    OPS,
    SHAPE,
    Draw,
    Dtypes,
    assert_equal,
    forward,
    gradients_for,
    make,
    on_every_target,
    results,
    with_both_modes,
)


@on_every_target
@with_both_modes
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_operands_may_lie_anywhere(target: Target, name: str, wide: bool, mode: str) -> None:
    """One element off any boundary, as a view may be in the replay that was none in the rollout."""

    def moved(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)

    more = {"heads": (4, 128)} if wide and name.startswith("rope") else {}
    op = OPS[name](Draw((BF16, BF16), 0), (2, SHAPE[1], 1536) if wide else SHAPE, **more).on(target)
    grads = gradients_for(forward(op, mode, target.backend)[1])
    wanted = results(op, mode, target.backend, grads)
    there = replace(op, tensors=tuple(map(moved, op.tensors)))
    assert_equal(results(there, mode, target.backend, list(map(moved, grads))), wanted)


class TestSelfChecks:
    @on_every_target
    @pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (BF16, F32)], ids=dtype_id)
    @pytest.mark.parametrize("name", OPS)
    def test_every_op_passes(self, target: Target, name: str, dtypes: Dtypes) -> None:
        selfcheck.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*differs from eager torch")
            results(make(name, target, dtypes), "lossless", target.backend)
        # GELU in this mode is torch's own.
        launched = target.backend == "triton" and not name.startswith("gelu")
        assert {check.direction for check in selfcheck.records()} == ({"forward", "backward"} if launched else set())

    @pytest.mark.parametrize("target", ON_GPU)
    def test_in_the_warm_up_of_graph_trees(self, target: Target) -> None:
        """The first call of all compares, and leaves nothing in the graphs' memory."""
        op = make("gated norm", target)
        with torch.no_grad():
            wanted = op.function("lossless", target.backend, *op.tensors)
        selfcheck.clear()
        torch._dynamo.reset()
        run = torch.compile(partial(op.function, "lossless", target.backend), fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                found = [value.clone() for value in run(*op.tensors)]
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert [check.direction for check in selfcheck.records()] == ["forward"] * 2
