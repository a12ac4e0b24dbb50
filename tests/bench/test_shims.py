"""The benchmark of the projects' step functions: every function runs, and ours does what is timed beside it."""

import pytest
import torch
from bench.shims import measure, shims, ways

from tests.compat.cases import find, ours
from tests.tolerances import chain_error

CPU, SHAPE = torch.device("cpu"), (1, 2, 3, 4)


@pytest.mark.parametrize("name", shims())
def test_a_function(name: str) -> None:
    shim = shims()[name]
    module, _, attribute = shim.ours.partition(":")
    peer, mine = (ways(shim, f, SHAPE, CPU)["replay"](0) for f in (shim.peer, find(ours(module), attribute)))
    assert len(peer) == len(mine) and peer[shim.score].requires_grad
    found, want = (result[shim.score].detach() for result in (mine, peer))
    assert float((found - want).abs().max()) <= chain_error(want, torch.bfloat16)


def test_rows() -> None:
    rows = list(measure(["DanceGRPO flux_step"], {"tiny": SHAPE}, 1, CPU))
    assert [row["way"] for row in rows] == ["rollout", "replay", "backward"]
    for row in rows:
        assert row["shape"] == list(SHAPE) and all(row[f"us_{which}"] > 0 for which in ("peer", "ours", "run"))
