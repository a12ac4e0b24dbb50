"""Accelerated and checkpointed blocks under context parallelism, FSDP2 and FSDP1: the bits of diffusers' own."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ..processes import together

WORLD = 2
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


def start(worker: str, folder: Path) -> Path:
    """Runs two processes to their ends; their findings begin with the returned path."""
    output = folder / "found"
    script, files = str(Path(__file__).with_name(worker)), [str(folder / "store"), str(output)]
    together([[script, str(rank), *files] for rank in range(WORLD)], folder, scripts=True)
    return output


def test_two_processes(tmp_path: Path) -> None:
    """Blocks and checkpoint policies change no bit where weights or tokens are split."""
    output = start("parallel_worker.py", tmp_path)
    for kind, rank in itertools.product(("tokens", "weights", "policies"), range(WORLD)):
        found = torch.load(f"{output}.{kind}.{rank}", weights_only=True)
        wanted = found.pop("none" if kind == "policies" else "eager")
        assert len(wanted) > 10 and len(found) == (7 if kind == "policies" else 1)
        for name, values in found.items():
            assert values.keys() == wanted.keys()
            assert not [key for key in wanted if not torch.equal(values[key], wanted[key])], (kind, name)


@pytest.mark.release
def test_fsdp1_around_each_block(tmp_path: Path) -> None:
    """Checkpointed blocks, a copy for an average of the weights, LoRA; on two processes and on one."""
    pytest.importorskip("peft")
    output = start("fsdp1_worker.py", tmp_path)
    for rank in range(WORLD):
        found = torch.load(f"{output}.{rank}", weights_only=True)
        assert found.pop("refusal").startswith("norm: got a FullyShardedDataParallel that is a unit of its own")
        assert len(found) == 5
        for case, (eager, lossless) in found.items():
            assert eager.keys() == lossless.keys()
            assert any("single_transformer_blocks" in name for name in eager), case
            assert not torch.equal(eager["0.output"], eager["1.output"])
            assert not [name for name in eager if not torch.equal(lossless[name], eager[name])], case
