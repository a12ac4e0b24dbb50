"""The learning rate of every update, and that of a run in two parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler

from dancegrpo_fast.recipe import TrainSettings
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.loop import Trainer
from dancegrpo_fast.train.schedule import learning_rate

from .tiny import make_recipe, reward


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_values_are_those_of_diffusers(schedule: Any, warmup: int) -> None:
    """And of transformers. Their first update, of rate 0, is left out: we warm up one update earlier."""
    train = TrainSettings(4, 2, 2, 2, updates_per_rollout=2, inner_epochs=2, warmup_updates=warmup, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    kind = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=16)
    wanted = []
    for _ in range(17):
        wanted += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    ours = [learning_rate(train, update) for update in range(16)]
    assert ours == pytest.approx([wanted[update + (update < warmup)] for update in range(16)], rel=1e-15)
    assert max(ours) == train.learning_rate and min(ours) > 0.0


def test_a_run_in_two_parts_has_the_rates_of_one(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update has one sample; two of three are skipped, as their groups' rewards are equal, and count."""
    options: dict[str, Any] = {
        "updates_per_rollout": 12,
        "warmup_updates": 5,
        "schedule": "cosine",
        "rewards": [reward("FirstGroup")],
    }
    recipe = make_recipe(flux, tmp_path / "whole", **options)
    whole, rates = Trainer(recipe), []
    whole.optimizer.torch.register_step_pre_hook(lambda adamw, *_: rates.append(adamw.param_groups[0]["lr"]))
    whole.run()
    assert rates == [learning_rate(recipe.train, update) for update in range(24)]

    cut = Trainer(make_recipe(flux, tmp_path / "cut", **options))
    with monkeypatch.context() as stop:
        stop.setattr(cut, "iteration", lambda number: Trainer.iteration(cut, number) if number == 1 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cut.run()
    Trainer(make_recipe(flux, tmp_path / "cut", **options), resume="auto").run()
    ours, wanted = (run / "checkpoints" / "000002" for run in (tmp_path / "cut", tmp_path / "whole"))
    weights, truth = checkpoint.load(ours)[0]["model"], checkpoint.load(wanted)[0]["model"]
    assert all(torch.equal(weights[name], value) for name, value in truth.items())
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == [rates[11], rates[23]]

    # Another end is another fall.
    with pytest.raises(ValueError, match=r"another recipe; train\.iterations: got 3, want 2;"):
        Trainer(make_recipe(flux, tmp_path / "cut", iterations=3, **options), resume="auto")


def test_a_warm_up_leaves_updates_to_fall_in() -> None:
    train: dict[str, Any] = {"iterations": 3, "prompts_per_iteration": 1, "group_size": 4, "micro_batch": 2}
    with pytest.raises(ValueError, match=r"train\.warmup_updates: got 6, want less than the run's 6 updates"):
        TrainSettings(**train, updates_per_rollout=2, warmup_updates=6)
    with pytest.raises(ValueError, match=r"train\.warmup_updates: got -1, want at least 0"):
        TrainSettings(**train, warmup_updates=-1)
    assert TrainSettings(**train, updates_per_rollout=2, warmup_updates=5).updates == 6
