"""Checkpoint policies with FSDP2: two gloo processes, the bits of the same model without checkpointing."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ..processes import together

WORKER = Path(__file__).with_name("parallel_worker.py")
WORLD = 2


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_split_weights_in_two_processes(tmp_path: Path) -> None:
    output = tmp_path / "found"
    command = [sys.executable, "-P", str(WORKER)]
    commands = [[*command, str(rank), str(tmp_path / "store"), str(output)] for rank in range(WORLD)]
    together(commands, tmp_path, [os.environ | {"OMP_NUM_THREADS": "1"}] * WORLD)
    for rank in range(WORLD):
        found = torch.load(f"{output}.{rank}", weights_only=True)
        wanted = found.pop("none")
        assert len(wanted) > 10 and len(found) > 3
        for case, values in found.items():
            assert values.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(values[name], value), (case, name)
