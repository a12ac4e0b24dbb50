"""Whose a run's folder is, and what in it."""

import errno
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.run.folder import RunDirectory
from dancegrpo_fast.train.loop import Trainer

from ..train.tiny import make_recipe


def test_without_locks_the_file_says_whose_a_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    here, child = socket.gethostname(), os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for number, (host, pid, free) in enumerate(
        [(here, child, True), (here, os.getpid(), True), (here, os.getppid(), False), ("elsewhere", child, False)]
    ):
        (root := tmp_path / str(number)).mkdir()
        lock = root / ".lock"
        lock.write_text(json.dumps({"host": host, "pid": pid, "since": "noon"}))
        refused = RunDirectory(root).claim()
        if free:
            assert refused is None and json.loads(lock.read_text())["pid"] == os.getpid()
        else:
            assert refused == (
                f"output_dir: got {root}, where a run is going on: process {pid} on {host}, since noon; "
                f"if that has ended, remove {lock}"
            )
    (root := tmp_path / "torn").mkdir()
    (root / ".lock").write_text('{"host')
    assert RunDirectory(root).claim() is None


def test_half_written_checkpoints_are_ignored_and_removed(flux: Path, finished: Path) -> None:
    stale = finished / "checkpoints" / ".000009.1"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    trainer = Trainer(make_recipe(flux, finished, iterations=3), resume="auto")
    assert trainer.start == 2
    trainer.run()
    assert not stale.exists()
    assert [path.name for path in checkpoint.complete(finished / "checkpoints")] == ["000002", "000003"]


def test_what_is_not_of_this_library_stays(flux: Path, finished: Path, tmp_path: Path) -> None:
    elsewhere, checkpoints = tmp_path / "elsewhere", finished / "checkpoints"
    shutil.copytree(checkpoints / "000001", elsewhere / "000001")
    shutil.rmtree(checkpoints / "000001")
    (checkpoints / "000001").symlink_to(elsewhere / "000001")
    (checkpoints / ".000000.1").symlink_to(elsewhere)
    for name in ("checkpoints/.git", "checkpoints/.best.2", ".model.backup", ".models.7"):
        (finished / name).mkdir()
    for name in ("checkpoints/.000001.old", "checkpoints/.000009.77", ".model.77"):
        (finished / name).mkdir()
    (checkpoints / ".latest").touch()
    Trainer(make_recipe(flux, finished, iterations=3, keep_checkpoints=1), resume="auto").run()
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *(".000000.1", ".best.2", ".git", ".latest", "000001", "000003")
    ]
    assert sorted(path.name for path in finished.glob(".model*")) == [".model.backup", ".models.7"]
    assert (elsewhere / "000001" / "state.json").is_file()
