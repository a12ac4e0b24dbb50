"""Accelerated blocks under context parallelism and FSDP2: two gloo processes, the bits of diffusers' own blocks."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

WORKER = Path(__file__).with_name("parallel_worker.py")
WORLD = 2


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_two_processes(tmp_path: Path) -> None:
    output = tmp_path / "found"
    # -P: the installed package, not the folder of the script.
    command = [sys.executable, "-P", str(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(output)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(WORLD)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=180)
        assert worker.returncode == 0, errors[-3000:]
    for kind, rank in itertools.product(("tokens", "weights"), range(WORLD)):
        found = torch.load(f"{output}.{kind}.{rank}", weights_only=True)
        assert found["eager"].keys() == found["lossless"].keys() and len(found["eager"]) > 10
        for name, value in found["eager"].items():
            assert torch.equal(found["lossless"][name], value), (kind, name)
