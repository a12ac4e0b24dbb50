"""The recipes of a minute, each with options that no other recipe has, on the bases that they name."""

import dataclasses
from pathlib import Path

import pytest

from dancegrpo_fast.demo import bases, data, fitting
from dancegrpo_fast.recipe import load_recipe
from dancegrpo_fast.run.words import read_rows
from dancegrpo_fast.train.loop import Trainer

ROOT = Path(__file__).parents[2]
# What shows that its options are alive.
FIELDS = {
    "digits_guard": "reference_kl",
    "digits_window": "reward/digit_probability",
    "digits_vp_sde": "reward/digit_probability_win_rate",
}
# Of digits that the judge reads as asked for, from first to last evaluation; three times less than one run gained.
GAINS = {"digits_guard": 0.15, "digits_window": 0.17, "digits_vp_sde": 0.13}
recipes = pytest.mark.parametrize("name", FIELDS)


def build(folder: Path, *names: str) -> Path:
    data.write_prompts(folder / "recipes" / "prompts")
    for name in names:
        bases.build(name, folder / "runs" / "bases" / name)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of a few steps: what is tested is that the recipes run on them."""
    with pytest.MonkeyPatch.context() as patch:
        fit = fitting.fit
        patch.setattr(
            fitting, "fit", lambda label, parameters, loss, steps, rate: fit(label, parameters, loss, 2, rate)
        )
        for base in ("digits", "digits_ddim"):
            patch.setitem(bases.BASES, base, dataclasses.replace(bases.BASES[base], batch=4))
        return build(tmp_path_factory.mktemp("quick"), "digits", "digits_ddim")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("taught")


@recipes
def test_they_run(name: str, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quick)
    recipe, _ = load_recipe([str(ROOT / "recipes" / f"{name}.yaml"), "--output_dir", str(tmp_path / "run")])
    train = dataclasses.replace(recipe.train, iterations=1, prompts_per_iteration=2, group_size=4, micro_batch=4)
    Trainer(dataclasses.replace(recipe, train=train, evaluation=None, threads=1)).run()
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["ratio_first_update_max_dev"] == 0.0 and FIELDS[name] in row
    assert (tmp_path / "run" / "model_ema").is_dir() == (name == "digits_window")


@pytest.mark.release
@recipes
def test_they_learn(name: str, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(build(taught, "digits_ddim" if name == "digits_vp_sde" else "digits"))
    recipe, _ = load_recipe([str(ROOT / "recipes" / f"{name}.yaml"), "--output_dir", str(tmp_path / "run")])
    Trainer(dataclasses.replace(recipe, threads=1)).run()
    scores = [
        row["digit_judge"] for row in read_rows(tmp_path / "run" / "evaluations.jsonl") if row["sampler"] == "ode"
    ]
    assert scores[-1] - scores[0] > GAINS[name]
    assert all(row["ratio_first_update_max_dev"] == 0.0 for row in read_rows(tmp_path / "run" / "metrics.jsonl"))
