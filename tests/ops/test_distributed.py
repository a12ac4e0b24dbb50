"""The ops under DDP and FSDP2: two gloo processes give the losses, ratios and weights of one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ..processes import together
from .distributed_worker import KINDS, make_model, update

WORKER = Path(__file__).with_name("distributed_worker.py")
WORLD = 2


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    store, output = tmp_path / "store", tmp_path / "found"
    files = str(WORLD), str(store), str(output)
    together([[str(WORKER), str(rank), *files] for rank in range(WORLD)], tmp_path, scripts=True)
    model = make_model()
    alone = update(model, list(range(WORLD)), WORLD)
    assert bool((alone["first_ratio"] == 1.0).all()) and bool((alone["ratio"] != 1.0).any())
    # Before torch 2.9 gloo's mean was a sum, which FSDP2 takes (github.com/pytorch/pytorch/issues/162338).
    for kind in KINDS if torch.__version__ >= "2.9" else ("ddp",):
        found = [torch.load(f"{output}.{kind}.{rank}", weights_only=True) for rank in range(WORLD)]
        for name, value in alone.items():
            assert torch.equal(torch.cat([part[name] for part in found]), value), (kind, name)
        # Two gradients are halved and added in both, which rounds once either way.
        for name, weight in model.named_parameters():
            for part in found:
                assert torch.equal(part[name], weight), (kind, name)
