"""What a tiny run of any family must do: train with ratio 1 and a finite gradient, to weights that are compared."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.memory.planning.margins import with_margins
from dancegrpo_fast.memory.planning.planner import plan
from dancegrpo_fast.memory.planning.settings import GIB
from dancegrpo_fast.models import load_model, setup
from dancegrpo_fast.models.base import DiffusersModel
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.recipe import Recipe
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.loop import Trainer

from ..train.tiny import make_recipe

CPU = torch.device("cpu")


def run(recipe: Recipe, resume: str | None = None) -> None:
    """Trains. The first update of every iteration has ratio 1, every gradient is finite, and the weights move."""
    output = Path(recipe.output_dir or "")
    trainer = Trainer(recipe, resume)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    trainer.run()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == recipe.train.iterations
    for row in rows:
        assert row["ratio_first_update_max_dev"] == 0.0
        assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0.0
    after = weights(output)
    assert after.keys() == before.keys()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def small_recipe(base: Path, output: Path, **changes: Any) -> Recipe:
    small = {"prompts_per_iteration": 2, "group_size": 2, "num_steps": 3, "iterations": 3}
    return make_recipe(base, output, prompt_cache=str(base.parent / "cache"), **small | changes)


def train(base: Path, output: Path, **changes: Any) -> None:
    """`run` of a small recipe on a folder of tests/train/tiny.py."""
    run(small_recipe(base, output, **changes))


def weights(output: Path, iteration: int | None = None) -> dict[str, Tensor]:
    """Trained tensors after an iteration; None: of the last checkpoint."""
    folders = {int(folder.name): folder for folder in checkpoint.complete(output / "checkpoints")}
    return checkpoint.load(folders[iteration or max(folders)])[0]["model"]


def assert_same_weights(first: Path, second: Path, iteration: int | None = None) -> None:
    one, other = weights(first, iteration), weights(second, iteration)
    assert one and one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def pieces(recipe: Recipe, model: DiffusersModel) -> Any:
    """The planner's, for this recipe and its loaded model."""
    given = replace(recipe, model=replace(recipe.model, memory_gib=1.0))
    return setup._iteration(model, given, CPU, text_tokens=3)


def syncing(recipe: Recipe, processes: int) -> list[float]:
    """GiB of a run under FSDP2 whose gradients are reduced once an update, and after every call."""
    model: Any = load_model(recipe, CPU, [Prompt("red", {})])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "processes", lambda: (processes, "full_shard"))
        asked = setup._settings(model, recipe, CPU, text_tokens=3, gib=1.0)
    return [plan(asked.changed(gradient_sync=each), advise=False).total_bytes / GIB for each in ("update", "call")]


def least_gib(iteration: Any, size: int) -> float:
    """Of a device that holds so many bytes with its margins."""
    return with_margins(iteration.settings, size) / GIB
