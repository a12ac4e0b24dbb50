"""Prompt files, recipes, rewards: what comes in, and the errors that name it."""

import json
from pathlib import Path

import pytest

from dancegrpo_fast.cli import load_recipe, main
from dancegrpo_fast.config import RewardSettings
from dancegrpo_fast.prompts import load_prompts, prompts_of_iteration
from dancegrpo_fast.rewards import RewardSet, build_reward

RECIPES = Path(__file__).parents[2] / "recipes"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_prompt_files(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    assert [p.text for p in load_prompts(write(tmp_path / "a.txt", "one\n\n two \n"))] == ["one", "two"]
    rows = [{"prompt": "one", "digit": 1}, {"caption": "two", "digit": 2}]
    jsonl = load_prompts(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [(p.text, p.meta["digit"]) for p in jsonl] == [("one", 1), ("two", 2)]
    parquet.write_table(Table.from_pylist([{"caption": "x", "tag": "t"}]), tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet")[0].text == "x"
    assert load_prompts(tmp_path / "a.parquet")[0].meta["tag"] == "t"


def test_prompt_folders(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "one\n")
    write(tmp_path / "test.txt", "two\n")
    assert load_prompts(tmp_path, "test")[0].text == "two"
    write(tmp_path / "train.jsonl", '{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"prompts: got 2 files train"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", "\n\n", "holds no prompts"),
        ("a.csv", "x", "csv"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("b.jsonl", "[1]", "line 1 is list"),
        ("c.jsonl", '{"text": "x"}', "row 1 has"),
        ("d.jsonl", '{"prompt": ""}', "row 1 has"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"prompts: .*{message}"):
        load_prompts(path)


def test_every_epoch_is_a_permutation(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path / "a.txt", "\n".join("abcdefg")))
    order = [p.text for iteration in range(7) for p in prompts_of_iteration(prompts, 3, iteration, seed=1)]
    epochs = [order[start : start + 7] for start in range(0, 21, 7)]
    assert all(sorted(epoch) == list("abcdefg") for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order != [p.text for iteration in range(7) for p in prompts_of_iteration(prompts, 3, iteration, seed=2)]


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
    ("option", "value", "message"),
    [
        ("--train.group_size", "1", "group_size"),
        ("--train.group_size", "many", "group_size"),
        ("--train.no_such", "1", "no_such"),
        ("--sampler.eta", "-0.1", "eta"),
        ("--train.micro_batch", "1000", "micro_batch"),
        ("--train.best_of_n", "7", "best_of_n"),
        ("--train.timestep_fraction", "0", "timestep_fraction"),
        ("--train.ema_decay", "1", "ema_decay"),
        ("--train.offload", "[disk]", "offload"),
        ("--train.updates_per_rollout", "500", "updates_per_rollout"),
        ("--rewards", "[]", "rewards"),
    ],
)
def test_bad_overrides(option: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe([str(RECIPES / "digits.yaml"), option, value])


def test_cli_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml, which does not exist" in capsys.readouterr().err
    assert main(["fly"]) == 2
    assert main([]) == 2
    assert main(["info"]) == 0
    assert "cpu        available" in capsys.readouterr().out


def test_rewards_by_name() -> None:
    with pytest.raises(ValueError, match='rewards: got "nothing"'):
        build_reward(RewardSettings("nothing"))
    with pytest.raises(ValueError, match="does not import"):
        build_reward(RewardSettings("no.such.module:Thing"))
    with pytest.raises(ValueError, match="does not take"):
        build_reward(RewardSettings("digit_judge", args={"colour": 1}))
    with pytest.raises(ValueError, match="each one once"):
        RewardSet([RewardSettings("ocr", args={}), RewardSettings("ocr", args={})])
