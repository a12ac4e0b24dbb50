"""A checkpoint: of many files, of an earlier format, and of several processes: whole or not there, in all of them."""

import errno
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import files
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.loop import Trainer

from ..train.tiny import make_recipe
from .continuing import longer

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


def test_a_checkpoint_of_the_first_format_goes_on(flux: Path, finished: Path, tmp_path: Path) -> None:
    """With SHA-256 of whole files, none of `state.json`, and fewer fields."""
    folder = finished / "checkpoints" / "000002"
    state = json.loads((folder / "state.json").read_text())
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    for name in ("crc32", "digest", "first_row", "changes"):
        del state[name]
    del state["recipe"]["model"]["max_text_tokens"], state["recipe"]["rewards"][0]["win_rate"]
    (folder / "state.json").write_text(json.dumps(state | {"format": 1, "sha256": hashes}))
    Trainer(longer(flux, finished), resume="auto").run()
    Trainer(make_recipe(flux, tmp_path / "whole", iterations=3)).run()
    ours, wanted = (checkpoint.load(run / "checkpoints" / "000003")[0] for run in (finished, tmp_path / "whole"))
    assert all(torch.equal(ours[group][name], one) for group in wanted for name, one in wanted[group].items())
    data = (path := folder / "model.safetensors").read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.load(folder)


def test_large_groups_are_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE", 100)
    monkeypatch.setattr(checkpoint, "CHUNK", 64)
    monkeypatch.setattr(files, "CHUNK", 64)
    group = {
        "a": torch.rand(20),
        "b": torch.rand(3, 4),
        "c": torch.tensor(1),
        "d": torch.rand(0, 2),
        "e": torch.rand(99),
    }
    folder = checkpoint.save(tmp_path, 7, {"model": group}, {})
    assert [path.name for path in sorted((folder / "model").iterdir())] == [
        f"00000-0000{n}.safetensors" for n in range(3)
    ]
    found = checkpoint.load(folder)[0]["model"]
    assert found.keys() == group.keys() and all(torch.equal(found[name], value) for name, value in group.items())
    part = checkpoint.stored(folder)[0]["model"]["b"]
    assert part.shape == (3, 4) and torch.equal(part[1:3, slice(None)], group["b"][1:3])
    data = bytearray((last := folder / "model" / "00000-00002.safetensors").read_bytes())
    for place in range(0, len(data), 50):
        last.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"model/00000-00002\.safetensors is damaged"):
            checkpoint.load(folder)
