"""A checkpoint that several processes write: whole or not there, in all of them."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.run import checkpoint

WORLD = 2


class Threads:
    """`Processes`, as far as checkpoints ask them, of threads."""

    shared: tuple[Barrier, list[Any]] = Barrier(WORLD), [None] * WORLD
    count = WORLD

    def __init__(self, index: int) -> None:
        self.index, self.is_main = index, index == 0

    def threads(self) -> int:
        return 1

    def collect(self, values: list[Any]) -> list[Any]:
        barrier, slots = self.shared
        slots[self.index] = values
        barrier.wait(60)
        found = [one for part in slots for one in part]
        barrier.wait(60)
        return found


class Rows(Tensor):
    """Stands for a process's rows of a tensor."""


def together(work: Any) -> list[Any]:
    with ThreadPoolExecutor(WORLD) as pool:
        return [one.exception() or one.result() for one in [pool.submit(work, Threads(n)) for n in range(WORLD)]]


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes has of a group: its rows, and what all have."""
    rows = [torch.arange(6.0).reshape(3, 2)[:2].as_subclass(Rows), torch.tensor([[4.0, 5.0]]).as_subclass(Rows)]
    starts = {id(rows[0]): [0, 0], id(rows[1]): [2, 0]}
    monkeypatch.setattr(checkpoint, "is_shard", lambda value: id(value) in starts)
    monkeypatch.setattr(checkpoint, "shard", lambda value: (value.as_subclass(Tensor), starts.get(id(value), [])))
    return [{"model": {"rows": one, "step": torch.tensor(7.0)}} for one in rows]


def test_processes_make_one_folder(sharded: Any, tmp_path: Path) -> None:
    assert together(lambda p: checkpoint.save(tmp_path, 3, sharded[p.index], {}, p)) == [tmp_path / "000003"] * WORLD
    found = checkpoint.load(tmp_path / "000003")[0]["model"]
    assert torch.equal(found["rows"], torch.arange(6.0).reshape(3, 2)) and found["step"] == 7
    # Each verifies its share of the files, and all know.
    last = tmp_path / "000003" / "model" / "00001-00000.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    for error in together(lambda p: checkpoint.stored(tmp_path / "000003", p)):
        assert isinstance(error, ValueError) and "00001-00000.safetensors is damaged" in str(error)


@pytest.mark.parametrize("failing", ["00000-00000", "00001-00000"])
def test_where_one_cannot_write_nothing_is_left(
    sharded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    (older := tmp_path / "000001").mkdir()

    def full(path: Path) -> None:
        if path.stem == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    for error in together(lambda p: checkpoint.save(tmp_path, 3, sharded[p.index], {}, p)):
        assert isinstance(error, OSError) and "No space left on device, 0.0 MB to write" in str(error)
    assert list(tmp_path.iterdir()) == [older]
