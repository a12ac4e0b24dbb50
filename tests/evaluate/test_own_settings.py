"""Evaluation by samplers, steps, a size and weights of its own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dancegrpo_fast.cli import main
from dancegrpo_fast.evaluate.scores import evaluate
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.loop import Trainer

from ..train import tiny
from .test_evaluate import mean_brightness, recipe_for, rows_of


def test_evaluation_samples_as_its_own_settings_say(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a recipe with that sampler, in the run and in the command; what is trained stays the same."""
    own = {"num_steps": 6, "height": 32}
    plain = recipe_for(flux, tmp_path / "plain", ema_decay=0.5)
    recipe = recipe_for(flux, tmp_path / "run", ema_decay=0.5)
    recipe.evaluation = replace(plain.evaluation, samplers=["sde"], **own)
    Trainer(plain).run()
    assert main(["train", str(tiny.write_recipe(recipe, tmp_path / "recipe.yaml"))]) == 0
    assert "Brightness 0." in capsys.readouterr().out.splitlines()[-1]
    weights = [checkpoint.load(tmp_path / name / "checkpoints" / "000001")[0] for name in ("plain", "run")]
    for name, value in weights[0]["model"].items():
        assert torch.equal(value, weights[1]["model"][name])
    before, after = map(json.loads, (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    assert [before["sampler"], after["sampler"]] == ["sde", "sde"]

    same = replace(
        recipe, sampler=replace(recipe.sampler, **own), evaluation=replace(plain.evaluation, samplers=["sde"])
    )
    for name, settings, source in (("base", same, None), ("average", same, "run"), ("own", recipe, "run")):
        evaluate(settings, source and str(tmp_path / source), tmp_path / name)
    means = {name: mean_brightness(rows_of(tmp_path / name)) for name in ("base", "average", "own")}
    assert means == {"base": before["Brightness"], "average": after["Brightness"], "own": after["Brightness"]}
    trained = replace(recipe, evaluation=replace(recipe.evaluation, ema=False))
    evaluate(trained, str(tmp_path / "run"), tmp_path / "trained")
    evaluate(recipe, str(tmp_path / "run"), tmp_path / "asked", weights="model")
    assert (
        mean_brightness(rows_of(tmp_path / "trained"))
        == mean_brightness(rows_of(tmp_path / "asked"))
        != after["Brightness"]
    )
    row = rows_of(tmp_path / "own")[0]
    assert Image.open(tmp_path / "own" / row["file"]).size == (16, 32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("samplers", ["ode", "heun"], r"evaluation\.samplers: got \['ode', 'heun'\], want one or both"),
        ("samplers", [], r"evaluation\.samplers: got \[\]"),
        ("samplers", ["ode", "ode"], r"evaluation\.samplers: got"),
        ("num_steps", 1, r"evaluation\.num_steps: got 1, want at least 2"),
        ("height", 0, r"evaluation\.height: got 0, want more than 0"),
        ("width", 21, r"evaluation: sampler: got height 16, width 21, want multiples of"),
        ("guidance_scale", 2.0, r"evaluation: sampler\.guidance_scale: got 2\.0, want 1"),
        ("num_steps", 2, r"evaluation: sampler\.window: got 2"),
    ],
)
def test_settings_that_evaluation_cannot_have_are_refused(
    flux: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    recipe = recipe_for(flux, tmp_path / "run", window=[2])
    with pytest.raises(ValueError, match=message):
        evaluate(replace(recipe, evaluation=replace(recipe.evaluation, **{field: value})), None, tmp_path / "out")
