"""What `evaluate` scores, held to the run that left it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dancegrpo_fast.evaluate.scores import evaluate
from dancegrpo_fast.recipe import LoraSettings
from dancegrpo_fast.train.loop import Trainer

from ..release import release_but
from ..train import tiny
from .test_evaluate import recipe_for, rows_of


@pytest.mark.parametrize("lora", release_but((True,), [False, True]), ids=["full", "lora"])
def test_saved_models_equal_their_checkpoint(flux: Path, tmp_path: Path, lora: bool) -> None:
    adapters = {"lora": LoraSettings(rank=2, alpha=6)} if lora else {}
    Trainer(recipe_for(flux, tmp_path / "run", **adapters)).run()
    recipe = recipe_for(flux, tmp_path / "unused", **adapters)
    evaluate(recipe, str(tmp_path / "run" / "checkpoints" / "000001"), tmp_path / "a", samplers=["ode"])
    evaluate(recipe, str(tmp_path / "run" / "model"), tmp_path / "b", samplers=["ode"])
    plain = replace(recipe, model=replace(recipe.model, lora=None))
    evaluate(plain, str(tmp_path / "run" / "model"), tmp_path / "c", samplers=["ode"])
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b == c
    evaluate(recipe, None, tmp_path / "flux", samplers=["ode"])
    assert a != rows_of(tmp_path / "flux")


def test_weights_of_another_model_are_refused(flux: Path, tmp_path: Path) -> None:
    """Of a base with the same shapes, too, which a full run's weights replace."""
    other = tiny.make_flux(tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(file).items()}, file)
    lora = {"lora": LoraSettings(rank=2, alpha=6)}
    trained = tmp_path / "trained"
    Trainer(recipe_for(flux, trained)).run()
    Trainer(recipe_for(flux, tmp_path / "run", **lora)).run()

    def refused(message: str, source: Path, base: Path = flux, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(recipe_for(base, tmp_path / "unused", **changes), str(source), tmp_path / "out", ["ode"])

    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "000001", tmp_path / "run" / "model"):
        base = (
            r"checkpoint: got .* another transformer/diffusion_pytorch_model.safetensors than model.path .*other, want"
        )
        refused(base, source, other, **lora)
        refused(r"model.lora.alpha: got 12, want 6, which .* has for ", source, lora=LoraSettings(rank=2, alpha=12))
        refused(r"model.lora.rank: got 4, want 2, which .* has for ", source, lora=LoraSettings(rank=4, alpha=12))
        targets = LoraSettings(rank=2, alpha=6, target_modules=["to_q"])
        refused(r"model.lora.target_modules: got \['to_q'\], want \['to_k', 'to_out.0', 'to_q'", source, lora=targets)
    refused(r"checkpoint: .* which this model lacks", trained, **lora)
    # A saved file is of no run, and all of a denoiser is in a full run's weights.
    saved = tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors"
    evaluate(recipe_for(other, tmp_path / "unused", **lora), str(saved), tmp_path / "on_other", ["ode"])
    evaluate(recipe_for(other, tmp_path / "unused"), str(trained), tmp_path / "full", ["ode"])
    evaluate(recipe_for(flux, tmp_path / "unused"), str(trained), tmp_path / "own", ["ode"])
    assert rows_of(tmp_path / "full") == rows_of(tmp_path / "own") != rows_of(tmp_path / "on_other")


def test_what_a_run_began_with_is_named(flux: Path, tmp_path: Path) -> None:
    """Where its LoRA layers need it; all weights are whole without it."""
    lora = {"lora": LoraSettings(rank=2, alpha=6)}
    Trainer(recipe_for(flux, tmp_path / "first", **lora)).run()
    merged = {"start_from": str(tmp_path / "first"), "start_as": "merged"}
    for name, changes in (("again", lora), ("whole", {})):
        Trainer(recipe_for(flux, tmp_path / name, **changes, **merged)).run()
    with pytest.raises(
        ValueError, match=r"^model.start_from: got None, want .*first with model.start_as merged, as the"
    ):
        evaluate(recipe_for(flux, tmp_path / "unused", **lora), str(tmp_path / "again"), tmp_path / "out", ["ode"])
    evaluate(recipe_for(flux, tmp_path / "unused"), str(tmp_path / "whole"), tmp_path / "bare", ["ode"])
    evaluate(recipe_for(flux, tmp_path / "unused", **merged), str(tmp_path / "whole"), tmp_path / "same", ["ode"])
    assert rows_of(tmp_path / "bare") == rows_of(tmp_path / "same")
