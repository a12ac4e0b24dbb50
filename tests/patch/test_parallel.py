"""Accelerated blocks under context parallelism and FSDP2: two gloo processes, the bits of diffusers' own blocks."""

import itertools
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
def test_two_processes(tmp_path: Path) -> None:
    output = tmp_path / "found"
    # -P: the installed package, not the folder of the script.
    command = [sys.executable, "-P", str(WORKER)]
    commands = [[*command, str(rank), str(tmp_path / "store"), str(output)] for rank in range(WORLD)]
    together(commands, tmp_path, [os.environ | {"OMP_NUM_THREADS": "1"}] * WORLD)
    for kind, rank in itertools.product(("tokens", "weights"), range(WORLD)):
        found = torch.load(f"{output}.{kind}.{rank}", weights_only=True)
        assert found["eager"].keys() == found["lossless"].keys() and len(found["eager"]) > 10
        for name, value in found["eager"].items():
            assert torch.equal(found["lossless"][name], value), (kind, name)
