"""Samples that a reward dropped: as if they had never been drawn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.evaluate.scores import evaluate
from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.rewards import RewardInput, UnscoredError
from dancegrpo_fast.train.loop import Trainer

from .tiny import Brightness, EvaluationSettings, make_recipe, reward


class Without(Brightness):
    """Mean red, but never of the pictures that come first at these places of a group."""

    def __init__(self, places: list[int], group: int) -> None:
        super().__init__()
        self.places, self.group, self.refused = places, group, set[float]()

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        marks = inputs.frames.double().flatten(1).sum(dim=1).tolist()
        group = (inputs.group == self.group).nonzero().flatten().tolist()
        if group and not self.refused:
            self.refused = {marks[group[place]] for place in self.places}
        scores = super().__call__(inputs)
        reasons = {sample: "refused" for sample, mark in enumerate(marks) if mark in self.refused}
        if reasons:
            raise UnscoredError(scores, reasons)
        return scores


def without(*places: int, group: int = 0, max_dropped: float = 0.9) -> RewardSettings:
    args = {"places": list(places), "group": group}
    return RewardSettings(f"{__name__}:Without", on_error="drop", max_dropped=max_dropped, args=args)


def run(base: Path, output: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The row of one iteration, and the weights after it; samples of one prompt, in calls of one row."""
    fixed: dict[str, Any] = {"prompts_per_iteration": 1, "micro_batch": 1, "shared_noise": False, "iterations": 1}
    trainer = Trainer(make_recipe(base, output, **fixed | changes))
    row = trainer.iteration(1)
    return row, {name: value.detach() for name, value in trainer.parameters.items()}


@pytest.mark.parametrize(
    ("size", "places", "changes", "as_size", "as_changes"),
    [
        (5, (3, 4), {"kl_weight": 0.1, "updates_per_rollout": 3}, 3, {"kl_weight": 0.1, "updates_per_rollout": 3}),
        (5, (4,), {"best_of_n": 1}, 4, {"best_of_n": 1}),
        # Of three that are left best-of-2 keeps all.
        (4, (3,), {"best_of_n": 2}, 3, {}),
    ],
    ids=["all", "best of 1", "best of 2"],
)
def test_a_dropped_sample_leaves_the_run_that_never_drew_it(
    flux: Path, tmp_path: Path, size: int, places: tuple[int, ...], changes: Any, as_size: int, as_changes: Any
) -> None:
    with pytest.warns(UserWarning, match=f"gave no score to {len(places)} of {size} samples, .* they are dropped"):
        row, weights = run(flux, tmp_path / "dropped", group_size=size, rewards=[without(*places)], **changes)
    plain, wanted = run(flux, tmp_path / "plain", group_size=as_size, **as_changes)
    assert row["dropped"] == len(places) and plain["dropped"] == 0
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())
    assert row["pairs"] == plain["pairs"] and row["ratio_first_update_max_dev"] == 0.0
    for name in ("reward/", "reward_std/"):
        assert row[f"{name}Without"] == plain[f"{name}Brightness"]
    for name in ("advantage_max", "zero_std_groups", "grad_norm", "policy_loss", "skipped"):
        assert row[name] == plain[name]


@pytest.mark.parametrize("micro_batch", [4, 12])
def test_sets_of_groups(flux: Path, tmp_path: Path, micro_batch: int) -> None:
    """Best-of-N in three sets and in one: of the second prompt one sample is left, which goes as well."""
    rewards = [reward("Brightness"), without(0, 1, 2, group=1)]
    trainer = Trainer(make_recipe(flux, tmp_path / "run", best_of_n=1, micro_batch=micro_batch, rewards=rewards))
    assert len(trainer.collect._parts()) == 12 // micro_batch
    with pytest.warns(UserWarning, match="gave no score to 3 of"):
        batch = trainer.collect(1, trainer.prompts)
    assert batch.valid.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert batch.rewards[1].isnan().nonzero().flatten().tolist() == [4, 5, 6] and batch.rewards[0].isfinite().all()
    assert batch.advantages[4:8].eq(0).all()
    groups = batch.rewards[0].view(3, 4)
    ends = [4 * group + int(end) for group in (0, 2) for end in (groups[group].argmax(), groups[group].argmin())]
    assert list(batch.kept) == list(batch.chosen) == sorted(ends) and len(batch.trajectory.latents) == 4
    assert torch.equal(batch.own_advantages, batch.advantages[sorted(ends)])


def test_nothing_of_a_dropped_sample_is_looked_at(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even under a KL, which pulls on samples without an advantage."""
    made = make_recipe(flux, tmp_path / "run", rewards=[without(1, 3)], kl_weight=0.1, updates_per_rollout=2)
    trainer = Trainer(made)
    with pytest.warns(UserWarning, match="gave no score to 2 of 12"):
        batch = trainer.collect(1, trainer.prompts)
    latents = batch.trajectory.latents.clone()
    latents[[1, 3]] = torch.nan
    spoilt = replace(batch, trajectory=replace(batch.trajectory, latents=latents))
    monkeypatch.setattr(trainer, "collect", lambda *_: spoilt)
    row = trainer.iteration(1)
    assert row["dropped"] == 2 and row["pairs"] == 10 * 2
    assert all(value.isfinite().all() for value in trainer.parameters.values())


def test_more_updates_than_samples(flux: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"group_size": 4, "rewards": [without(0, 3)], "updates_per_rollout": 4}
    with pytest.warns(UserWarning, match="gave no score"):
        row, _ = run(flux, tmp_path / "run", **changes)
    assert row["pairs"] == 4 and row["grad_norm"] > 0


def test_what_ends_a_run(flux: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"rewards.max_dropped: Without left out 2 of 4 samples, want at most 0.25"),
        pytest.warns(UserWarning, match="gave no score"),
    ):
        run(flux, tmp_path / "limit", rewards=[without(0, 1, max_dropped=0.25)])
    with (
        pytest.raises(RuntimeError, match=r"rewards: left no group of iteration 1 with two samples, want one at least"),
        pytest.warns(UserWarning, match="gave no score"),
    ):
        run(flux, tmp_path / "none", rewards=[without(0, 1, 2)])


def test_evaluation(flux: Path, tmp_path: Path) -> None:
    """A sample without a score is in no mean, and is asked for again when the command is run again."""
    rewards = [reward("Brightness"), without(0, group=1, max_dropped=0.2)]
    settings = EvaluationSettings(every=1, samples_per_prompt=2, grid_samples=2, rewards=rewards)
    made = make_recipe(flux, tmp_path / "run", iterations=1, evaluation=settings, micro_batch=12)
    with pytest.warns(UserWarning, match="gave no score to 1 of 6"):
        Trainer(made).run()
    first = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[0])
    scores = tmp_path / "scores"
    with pytest.warns(UserWarning, match="gave no score to 1 of 6"):
        said = evaluate(made, None, scores, ["ode"])
    rows = [json.loads(line) for line in (scores / "scores.jsonl").read_text().splitlines()]
    plain, found = ([row["scores"][name] for row in rows] for name in ("Brightness", "Without"))
    assert found == [*plain[:2], None, *plain[3:]]
    assert first["dropped"] == 1 and first["Brightness"] == pytest.approx(sum(plain) / 6)
    table = {row["score"]: row for row in json.loads((scores / "summary.json").read_text())["table"]}
    # Both count a prompt once, however many of its samples have a score.
    assert table["Without"]["mean"] == pytest.approx((sum(plain[:2]) / 2 + plain[3] + sum(plain[4:]) / 2) / 3)
    assert first["Without"] == pytest.approx(table["Without"]["mean"])
    assert (table["Without"]["samples"], table["Brightness"]["samples"]) == (5, 6)
    assert said is not None and "nan" not in said
    made.evaluation.rewards[1].max_dropped = 0.1
    with (
        pytest.raises(RuntimeError, match=r"rewards.max_dropped: Without left out 1 of 6 samples, want at most 0.1"),
        pytest.warns(UserWarning, match="gave no score to 1 of 6"),
    ):
        evaluate(made, None, tmp_path / "others", ["ode"])
