"""Runs that start from other weights: what they train, what KL measures from, and what continues them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.loop import Trainer

from ..models import lora_files
from ..models.checks import assert_same_weights, weights
from .tiny import LoraSettings, make_recipe

LORA = LoraSettings(rank=2, alpha=6, target_modules=lora_files.TARGETS)
KL: dict[str, Any] = {"kl_weight": 0.1, "learning_rate": 1e-2}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lora_layers_are_trained_on(flux: Path, tmp_path: Path) -> None:
    """KL is from the layers as they were; a run that ends and goes on has the same bits; another file is refused."""
    written = lora_files.write("peft", flux, tmp_path / "file")
    more: dict[str, Any] = {"lora": LORA, "start_from": str(tmp_path / "file"), **KL}
    trainer = Trainer(make_recipe(flux, tmp_path / "whole", **more))
    lora_files.assert_same(lora_files.layers(trainer.denoiser), written)
    assert set(trainer.parameters) == {f"{name}.lora_{part}.default.weight" for name in written for part in "AB"}
    trainer.run()
    found = rows(tmp_path / "whole")
    assert found[0]["reference_kl"] == 0.0 < found[1]["reference_kl"]
    Trainer(make_recipe(flux, tmp_path / "parts", **more | {"iterations": 1})).run()
    moved = shutil.copytree(tmp_path / "file", tmp_path / "moved")
    with pytest.raises(ValueError, match=r'model.start_as: got "merged", want "adapter"'):
        Trainer(make_recipe(flux, tmp_path / "parts", **more | {"start_as": "merged"}), "auto")
    (file,) = (tmp_path / "file").glob("*.safetensors")
    save_file({name: 2 * value for name, value in load_file(file).items()}, moved / file.name)
    with pytest.raises(ValueError, match=r"model.start_from: got .*start_from/adapter_model.safetensors"):
        Trainer(make_recipe(flux, tmp_path / "parts", **more | {"start_from": str(moved)}), "auto")
    shutil.copy(file, moved)
    Trainer(make_recipe(flux, tmp_path / "parts", **more | {"start_from": str(moved)}), "auto").run()
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert [row["reference_kl"] for row in rows(tmp_path / "parts")] == [row["reference_kl"] for row in found]

    # What is saved is what the run trained, and starts another one.
    again = Trainer(make_recipe(flux, tmp_path / "again", lora=LORA, start_from=str(tmp_path / "whole" / "model")))
    from_run = Trainer(make_recipe(flux, tmp_path / "from_run", lora=LORA, start_from=str(tmp_path / "whole")))
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(again.parameters[name], value) and torch.equal(from_run.parameters[name], value)


def test_all_weights_are_trained_on(flux: Path, tmp_path: Path) -> None:
    """With a LoRA in them, and from where another run was."""
    lora_files.write("diffusers", flux, tmp_path / "file")
    recipe = make_recipe(
        flux, tmp_path / "run", start_from=str(tmp_path / "file"), start_as="merged", iterations=1, **KL
    )
    trainer = Trainer(recipe)
    base, _ = lora_files.denoiser_of(flux)
    assert trainer.parameters.keys() == dict(base.named_parameters()).keys()
    changed = {name for name, value in base.named_parameters() if not torch.equal(trainer.parameters[name], value)}
    assert changed == {f"{name}.weight" for name in lora_files.write("diffusers", flux, tmp_path / "again")}
    trainer.run()
    assert rows(tmp_path / "run")[0]["reference_kl"] == 0.0
    for start in ("run", "run/model", "run/checkpoints/000001"):
        other = Trainer(make_recipe(flux, tmp_path / "other", start_from=str(tmp_path / start)))
        trained = checkpoint.load(tmp_path / "run" / "checkpoints" / "000001")[0]["model"]
        assert all(torch.equal(other.parameters[name], value) for name, value in trained.items())
