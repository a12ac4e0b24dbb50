"""Recipes and rewards: what comes in, and the errors that name it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.cli import main
from dancegrpo_fast.evaluate.scores import evaluate
from dancegrpo_fast.recipe import EvaluationSettings, RewardSettings, load_recipe
from dancegrpo_fast.rewards import RewardInput, RewardSet, build_reward
from dancegrpo_fast.train.loop import Trainer

from .tiny import make_recipe, reward

RECIPES = Path(__file__).parents[2] / "recipes"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    recipe, options = load_recipe([str(path)], resume=None)
    assert recipe.name == path.stem
    assert options == {"resume": None}


def test_overrides() -> None:
    given = [str(RECIPES / "digits.yaml"), "--resume", "auto", "--train.group_size", "6"]
    recipe, options = load_recipe(given, resume=None)
    assert (recipe.train.group_size, options["resume"]) == (6, "auto")
    lora = load_recipe([str(RECIPES / "digits.yaml"), "--model.lora.rank", "4"])[0].model.lora
    assert lora is not None and lora.rank == 4


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], 1e-4),
        (["--train.ratio_norm", "true"], 2e-6),
        (["--train.ratio_norm", "true", "--train.clip_range", "4e-6"], 4e-6),
        (["--train.clip_range", "null"], 1e-4),
        (["--train.clip_range", "[1e-4, 2e-4]"], (1e-4, 2e-4)),
    ],
)
def test_the_clip_range_is_written_down_as_a_number(given: list[str], wanted: Any) -> None:
    """What stands for it in a recipe may be null; a run that was made with the number is the same run."""
    recipe = load_recipe([str(RECIPES / "digits.yaml"), *given])[0]
    assert recipe.as_dict()["train"]["clip_range"] == recipe.train.ratio_clip() == wanted


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.group_size", "1", "group_size"),
        ("--train.group_size", "many", "group_size"),
        ("--train.no_such", "1", "no_such"),
        ("--train.iteration", "2", "train.iteration"),
        ("--sampler.eta", "-0.1", "eta"),
        ("--train.micro_batch", "1000", "micro_batch"),
        ("--train.best_of_n", "7", "best_of_n"),
        ("--train.timestep_fraction", "0", "timestep_fraction"),
        ("--train.ema_decay", "1", "ema_decay"),
        ("--train.offload", "[disk]", "offload"),
        ("--train.updates_per_rollout", "500", "updates_per_rollout"),
        ("--rewards", "[]", "rewards"),
        ("--rewards", "[{name: ocr, weight: 0}]", "^rewards.weight: got 0.0, want a number other than 0$"),
        ("--train.clip_range", "0", "^train.clip_range: got 0.0, want more than 0$"),
        ("--train.clip_range", "[1e-4, 0]", "^train.clip_range: got 0.0, want more than 0$"),
        ("--train.clip_range", "[-1e-4, 1e-4]", "^train.clip_range: got -0.0001, want more than 0$"),
        ("--train.clip_range", "[1e-4]", "clip_range"),
        ("--train.clip_range", "[1e-4, 1e-4, 1e-4]", "clip_range"),
        ("--train.clip_range", "wide", "clip_range"),
        ("--train.advantages", "prompt", "advantages"),
        ("--train.advantage_std_floor", "-1", "^train.advantage_std_floor: got -1.0, want at least 0$"),
        # Without the list of what was tried, and all that was given.
        ("--evaluation.every", "0", "^evaluation.every: got 0, want at least 1$"),
        ("--evaluation.accepted_by", "svm", "^evaluation.accepted_by: got .svm., want one of .*judge'], or null$"),
        ("--evaluation.nothing", "1", "^recipe: [^ ]*digits.yaml: [^\n]*Option 'nothing' is not accepted$"),
        ("--model.lora.rank", "0", "^model.lora.rank: got 0, want more than 0$"),
        ("--sampler.negative_prompt", "\udcff", "^sampler.negative_prompt: got .* with half of a surrogate pair"),
        ("--rewards", "[{name: ocr, args: {floor: .nan}}]", "^rewards.args: got .*, want plain values: "),
    ],
)
def test_bad_overrides(option: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe([str(RECIPES / "digits.yaml"), option, value])


def test_cli_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml, which does not exist" in capsys.readouterr().err
    assert main(["train", str(tmp_path)]) == 1
    assert "which is a folder" in capsys.readouterr().err
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    assert main(["train", str(tmp_path / "latin.yaml")]) == 1
    assert "recipe: got" in (said := capsys.readouterr().err) and "latin.yaml, want UTF-8" in said
    assert main(["fly"]) == 2
    assert main([]) == 2
    assert main(["info"]) == 0
    assert "cpu        available" in capsys.readouterr().out


class Faulty:
    """Not a matter of its arguments."""

    def __init__(self) -> None:
        raise TypeError("a bug of its own")


def test_a_reward_beside_its_recipe_that_raises_shows_where(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "faulty_reward.py").write_text("def score(inputs):\n    return inputs.meta[0]['no']\n")
    (tmp_path / "recipe.yaml").write_text(
        f"""
name: tiny
model: {{family: flux, path: {flux}}}
sampler: {{kind: dance_sde, num_steps: 3, eta: 0.3, height: 16, width: 16}}
prompts: {write(tmp_path / "prompts.txt", "red")}
rewards: [{{name: "faulty_reward:score"}}]
train: {{iterations: 1, prompts_per_iteration: 1, group_size: 2, micro_batch: 2}}
output_dir: {tmp_path / "run"}
threads: 1
"""
    )
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    said = capsys.readouterr().err
    assert "faulty_reward.py\", line 2, in score\n    return inputs.meta[0]['no']\n" in said
    assert said.endswith("dancegrpo-fast train: reward \"faulty_reward:score\" failed: KeyError: 'no'\n")


class Picky:
    """Wants a colour of every prompt."""

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        raise AssertionError("nothing should be sampled")

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        for prompt, columns in zip(prompts, meta, strict=True):
            if columns.get("colour") != prompt:
                raise ValueError(f"prompts: got {prompt!r} without a colour")


def test_prompts_that_a_reward_cannot_score_stop_the_run_at_once(flux: Path, tmp_path: Path) -> None:
    picky = RewardSettings(f"{__name__}:Picky")
    Trainer(recipe := make_recipe(flux, tmp_path / "run", rewards=[picky]))
    evaluation = EvaluationSettings(rewards=[picky], prompts=str(write(tmp_path / "test.txt", "red\n")))
    message = rf'rewards: "{__name__}:Picky" cannot score all prompts: prompts: got \'(red|blue)\' without'
    with pytest.raises(ValueError, match=message):
        Trainer(replace(recipe, rewards=[reward("Brightness")], evaluation=evaluation))
    with pytest.raises(ValueError, match=message):
        evaluate(replace(recipe, evaluation=evaluation), None, tmp_path / "scores")
    prompts = Path(recipe.prompts)
    prompts.write_text(prompts.read_text().replace('"colour": "blue"', '"colour": "red"'))
    with pytest.raises(ValueError, match=message):
        Trainer(recipe)


def test_rewards_by_name() -> None:
    with pytest.raises(ValueError, match='rewards: got "nothing"'):
        build_reward(RewardSettings("nothing"))
    with pytest.raises(ValueError, match="does not import"):
        build_reward(RewardSettings("no.such.module:Thing"))
    with pytest.raises(ValueError, match=r'got "statistics:Red", which .*statistics\.py does not have'):
        build_reward(RewardSettings("statistics:Red"))
    with pytest.raises(ValueError, match="does not take"):
        build_reward(RewardSettings("digit_judge", args={"colour": 1}))
    with pytest.raises(TypeError, match="a bug of its own"):
        build_reward(RewardSettings(f"{__name__}:Faulty"))
    with pytest.raises(ValueError, match=r"rewards\.args: got {'since': .*date.*}, want plain values: "):
        RewardSettings("ocr", args={"since": date(2024, 1, 2)})
    with pytest.raises(ValueError, match="each one once"):
        RewardSet([RewardSettings("ocr", args={}), RewardSettings("ocr", args={})])
