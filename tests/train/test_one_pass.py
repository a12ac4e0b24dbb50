"""One pass has the samples and the metrics of two, and their gradient but for the order of its sums."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.train import Trainer

from ..models import cases, folders
from ..tolerances import REORDERED_SUMS
from .test_gradients import KL, TWO, Seen, watched
from .tiny import LoraSettings, make_recipe, reward

LORA: dict[str, Any] = {"lora": LoraSettings(rank=2, alpha=4)}
# A middle step is left out, and full calls are rare: group of four in calls of three.
UNEVEN: dict[str, Any] = {"micro_batch": 3, "num_steps": 5, "timestep_fraction": 0.5}
BEST: dict[str, Any] = {"best_of_n": 1, "group_size": 5}
DROPPED: dict[str, Any] = {"rewards": [reward("Refusing", on_error="drop", max_dropped=0.9)], "group_size": 5}
RETAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven": UNEVEN,
    "every sample in its row": UNEVEN | {"rows_are_equal": False},
    "noise of each sample's own": {"shared_noise": False},
    "kl": {"kl_weight": KL["kl_weight"]},
    "kl of adapters": {"kl_weight": KL["kl_weight"]} | LORA,
    "ratio norm": {"ratio_norm": True},
    "best of n": BEST,
    "best of n, in their rows": BEST | UNEVEN | {"rows_are_equal": False},
    "batch": BEST | {"rewards": TWO, "advantages": "batch"},
    "dropped": DROPPED,
    "one group": {"rewards": [reward("FirstGroup")]},
    "no group": {"rewards": [reward("Constant")]},
    "ddim": {"guidance_scale": 4.0},
    "checkpointed": {"checkpointing": "full"},
}
REWEIGHTED = {name: changes | LORA for name, changes in RETAINED.items() if "kl_weight" not in changes}
ALL = [("retain", name) for name in RETAINED] + [("reweight", name) for name in REWEIGHTED]


def trained(recipe: Any) -> Seen:
    """One iteration, of LoRA layers that are not zero."""
    trainer = Trainer(recipe)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return watched(trainer)


def assert_alike(one: Seen, two: Seen) -> None:
    """The same samples, bit by bit, and all but their work and their times alike."""
    for ours, theirs in zip(vars(one.batch.trajectory).values(), vars(two.batch.trajectory).values(), strict=True):
        assert theirs is None if ours is None else torch.equal(ours, theirs)
    assert one.row.keys() == two.row.keys()
    assert one.row.get("log_prob_change") == two.row.get("log_prob_change")
    for name in one.row.keys() - {"seconds", "speed", "skipped", "log_prob_change"}:
        # Near 0 as advantages add up to it.
        near = 1e-6 if name == "policy_loss" else None
        assert one.row[name] == pytest.approx(two.row[name], rel=REORDERED_SUMS, abs=near), name
    (ours,), (theirs,) = one.gradients, two.gradients
    assert torch.linalg.norm(ours - theirs) <= REORDERED_SUMS * torch.linalg.norm(theirs)


@pytest.mark.parametrize(("passes", "name"), ALL)
def test_the_gradient_is_that_of_two(
    flux: Path, diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: Any, name: str
) -> None:
    changes = dict((RETAINED if passes == "retain" else REWEIGHTED)[name])
    equal = changes.pop("rows_are_equal", True)
    monkeypatch.setattr("dancegrpo_fast.train.setup.rows_are_equal", lambda *_: equal)
    base = diffusion if name == "ddim" else flux
    one, two = (
        trained(make_recipe(base, tmp_path / str(kind), passes=kind, max_grad_norm=1e9, **changes))
        for kind in (passes, 2)
    )
    assert_alike(one, two)
    assert one.row["skipped"]["model_rows"] < two.row["skipped"]["model_rows"] or name == "no group"


@pytest.mark.parametrize("passes", ["retain", "reweight"])
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_families(tmp_path: Path, passes: Any, family: str) -> None:
    base = folders.BUILDERS[family](tmp_path / family / "base")
    one, two = (
        trained(
            cases.make_recipe(
                cases.CASES[family],
                base,
                tmp_path / f"run-{kind}" / "out",
                passes=kind,
                lora=True,
                timestep_fraction=1.0,
                max_grad_norm=1e9,
            )
        )
        for kind in (passes, 2)
    )
    assert_alike(one, two)
