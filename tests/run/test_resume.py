"""A run that is resumed ends with the bits of one that was not interrupted; damaged checkpoints are named."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.cli import main
from dancegrpo_fast.run.folder import RunDirectory
from dancegrpo_fast.train.loop import Trainer

from ..train.tiny import LoraSettings, make_recipe, write_recipe
from .bits import rows
from .continuing import longer


def test_resume_with_lora_kl_and_momentum(base: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lora": LoraSettings(rank=2, alpha=2), "kl_weight": 0.1, "learning_rate": 1e-2}
    Trainer(make_recipe(base, tmp_path / "whole", iterations=4, **changes)).run()
    Trainer(make_recipe(base, tmp_path / "cut", iterations=2, **changes)).run()
    Trainer(make_recipe(base, tmp_path / "cut", iterations=4, **changes), resume="auto").run()
    assert rows(tmp_path / "whole" / "metrics.jsonl") == rows(tmp_path / "cut" / "metrics.jsonl")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_checkpoints_are_named(flux: Path, finished: Path, name: str, damage: str) -> None:
    path = finished / "checkpoints" / "000002" / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    rows = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"resume: .*{name} is (damaged|missing); other checkpoints there: 000001"):
        Trainer(longer(flux, finished), resume="auto")
    assert (finished / "metrics.jsonl").read_bytes() == rows
    # The one before it still works, in a directory of its own or once the damaged one is out of the way.
    older = finished / "checkpoints" / "000001"
    with pytest.raises(ValueError, match=r"resume: .*checkpoints 000002"):
        Trainer(make_recipe(flux, finished, keep_checkpoints=3), resume=str(older))
    assert Trainer(make_recipe(flux, finished.parent / "other"), resume=str(older)).start == 1
    elsewhere = shutil.copytree(older, finished.parent / "elsewhere" / "checkpoints" / "000001")
    with pytest.raises(ValueError, match=r"would overwrite"):
        Trainer(make_recipe(flux, finished), resume=str(elsewhere))


def test_what_is_no_checkpoint_is_named(flux: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match=r'resume: got nonsense, want "auto" or the folder of a checkpoint$'):
        Trainer(make_recipe(flux, finished), resume="nonsense")
    with pytest.raises(ValueError, match=rf"resume: got {finished}, want .* run: {finished}/checkpoints/000001, "):
        Trainer(make_recipe(flux, finished), resume=str(finished))
    (file := finished.parent / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir: got .*file, which is a file"):
        Trainer(make_recipe(flux, file), resume="auto")


def test_damaged_state_is_named(flux: Path, finished: Path) -> None:
    state = finished / "checkpoints" / "000002" / "state.json"
    text = state.read_text()
    state.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"resume: .*state\.json is damaged"):
        Trainer(make_recipe(flux, finished), resume="auto")
    state.write_text(text.replace('"iteration": 2', '"iteration": 1'))
    with pytest.raises(ValueError, match=r"resume: .*state\.json is damaged: .*; other checkpoints there: 000001$"):
        Trainer(make_recipe(flux, finished), resume="auto")
    state.write_text(text)
    (finished / "checkpoints" / "000002").rename(finished / "checkpoints" / "000005")
    with pytest.raises(ValueError, match=r"resume: .*000005 holds iteration 2, want the one of its name"):
        Trainer(make_recipe(flux, finished, iterations=6), resume="auto")
    state = finished / "checkpoints" / "000005" / "state.json"
    state.unlink()
    with pytest.raises(ValueError, match=r"resume: .*state\.json is missing"):
        Trainer(make_recipe(flux, finished), resume="auto")


def test_a_torn_last_row_is_dropped_and_another_is_not(flux: Path, finished: Path) -> None:
    metrics = finished / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + whole.splitlines()[-1][: -len(', "seconds": {}}')])
    Trainer(longer(flux, finished), resume="auto")
    assert metrics.read_text() == whole
    for damage in (b"{", b"[]\n", b"\xff\n"):
        metrics.write_bytes(damage + whole.encode())
        with pytest.raises(ValueError, match=r"output_dir: .*metrics\.jsonl (line 1 )?is damaged"):
            RunDirectory(finished).keep_until(2)
        assert metrics.read_bytes() == damage + whole.encode()


def test_lost_rows_are_named(flux: Path, finished: Path, tmp_path: Path) -> None:
    metrics = finished / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[1] + "\n")
    trainer = Trainer(longer(flux, finished, iterations=4), resume="auto")
    assert trainer.notes == [
        f"{metrics} lacks the rows of 1 iterations, from 1 to 1; they are lost, the weights are as they were"
    ]
    # Rows of a run that continues elsewhere begin there.
    first = finished / "checkpoints" / "000001"
    Trainer(make_recipe(flux, tmp_path / "other"), resume=str(first)).run()
    assert Trainer(longer(flux, tmp_path / "other"), resume="auto").notes == []


def test_a_finished_run_is_left_alone(flux: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}

    before = written()
    command = ["train", str(write_recipe(make_recipe(flux, finished), finished.parent / "recipe.yaml"))]
    assert main([*command, "--resume", "auto"]) == 0
    said = capsys.readouterr().out
    assert "tiny: all 2 iterations are done, for more raise train.iterations" in said
    assert f"everything is in {finished}" in said
    assert written() == before
    # A crash may have come between the last checkpoint and the model, or left an earlier one.
    for damage in (lambda: shutil.rmtree(finished / "model"), lambda: (finished / "model" / "saved.json").unlink()):
        damage()
        Trainer(make_recipe(flux, finished, keep_checkpoints=3), resume="auto").run()
        assert (finished / "model" / "transformer" / "config.json").is_file()
        assert RunDirectory(finished).saved("model") == 2
    assert rows(finished / "metrics.jsonl")[1]["iteration"] == 2
    with pytest.raises(ValueError, match=r"train\.iterations: got 1, want at least the 2 of .*000002"):
        Trainer(make_recipe(flux, finished, iterations=1), resume="auto")
