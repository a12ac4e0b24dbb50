"""Settings from Python are held to what the command line is held to; paths; keys that stand twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.recipe import (
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    Recipe,
    RewardSettings,
    SamplerSettings,
    TrainSettings,
    load_recipe,
)

DIGITS = Path(__file__).parents[2] / "recipes" / "digits.yaml"


def train(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"iterations": 1, "prompts_per_iteration": 1, "group_size": 2, "micro_batch": 1} | changes)


def sampler(**changes: Any) -> SamplerSettings:
    return SamplerSettings(**{"kind": "ode", "num_steps": 2, "eta": 0.1, "height": 8, "width": 8} | changes)


def model(**changes: Any) -> ModelSettings:
    return ModelSettings(**{"family": "flux", "path": "base"} | changes)


def recipe(**changes: Any) -> Recipe:
    parts = {"model": model(), "sampler": sampler(), "train": train(), "rewards": [RewardSettings("ocr")]}
    return Recipe(**{"name": "a", "prompts": "p.txt"} | parts | changes)


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (train, {"iterations": "5"}, 'train.iterations: got "5", want a whole number'),
        (train, {"iterations": True}, "train.iterations: got True, want a whole number"),
        (train, {"ratio_norm": 1}, "train.ratio_norm: got 1, want true or false"),
        (train, {"learning_rate": float("inf")}, "train.learning_rate: got inf, want a finite number"),
        (train, {"kl_weight": float("nan")}, "train.kl_weight: got nan, want a finite number"),
        (train, {"clip_range": [1e-4]}, r"train.clip_range: got list \(0.0001\), want a finite number or a list of"),
        (train, {"offload": ["disk"]}, r'train.offload: got list \("disk"\), want a list of "denoiser" or "vae" or'),
        (train, {"offload": "vae"}, 'train.offload: got "vae", want a list of'),
        (sampler, {"num_steps": 2.5}, "sampler.num_steps: got 2.5, want a whole number"),
        (sampler, {"kind": "waltz"}, 'sampler.kind: got "waltz", want "dance_sde" or'),
        (sampler, {"window": [0, 2]}, "sampler.window: got 2, want steps from 0 to 1"),
        (sampler, {"fps": "8"}, 'sampler.fps: got "8", want a finite number or null'),
        (model, {"dtype": "fp32"}, 'model.dtype: got "fp32", want "float32" or "bfloat16"'),
        (model, {"path": Path("base")}, "model.path: got PosixPath, want text"),
        (model, {"lora": {"rank": 4}}, "model.lora: got dict, want LoraSettings or null"),
        (LoraSettings, {"target_modules": "to_q"}, 'model.lora.target_modules: got "to_q", want a list of text'),
        (
            EvaluationSettings,
            {"rewards": [RewardSettings("ocr", label="dropped")]},
            'evaluation.rewards: got "dropped", which is something else in its rows, want another label',
        ),
        (recipe, {"seed": 1.0}, "seed: got 1.0, want a whole number"),
        (recipe, {"rewards": ["ocr"]}, r'rewards: got list \("ocr"\), want a list of RewardSettings'),
        (RewardSettings, {"name": "ocr", "weight": "1"}, 'rewards.weight: got "1", want a finite number'),
        (RewardSettings, {"name": "ocr", "args": [1]}, r"rewards.args: got list \(1\), want names with values"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_wrong_values_are_named(make: Callable[..., Any], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**wrong)


@pytest.mark.parametrize(
    ("what", "settings", "message"),
    [
        ("whole", {"lora": LoraSettings(), "blocks_to_swap": 2}, "model.blocks_to_swap 2, want 0"),
        ("blocks", {"lora": LoraSettings(), "quantization": "fp8", "dtype": "bfloat16"}, 'model.quantization "fp8"'),
        ("blocks", {"checkpointing": "auto"}, 'model.checkpointing "auto", which the planner finds for a model that'),
        ("blocks", {"checkpointing": "attention"}, 'model.checkpointing "attention", want "none", "full", "first:K"'),
        ("whole", {"checkpointing": "full", "offload": ["block_inputs"]}, 'train.offload "block_inputs", want no such'),
        ("blocks", {"sequence_parallel": 2}, "train.sequence_parallel 2, want 1"),
    ],
)
def test_what_is_not_compiled_is_named(what: str, settings: dict[str, Any], message: str) -> None:
    of_training = {name: settings.pop(name) for name in ("offload", "sequence_parallel") if name in settings}
    with pytest.raises(ValueError, match=f'^model.compile: got "{what}" with {message}'):
        recipe(model=model(compile=what, **settings), train=train(**of_training))


def test_values_of_json_are_taken() -> None:
    # Lists for tuples, and whole numbers for others.
    assert train(clip_range=[1e-4, 2], learning_rate=1, ema_decay=None, offload=("vae",)).clip_range == [1e-4, 2]


def test_pictures_show_as_many_samples_as_there_are() -> None:
    settings = EvaluationSettings(samples_per_prompt=2, rewards=[RewardSettings("ocr")])
    assert settings.grid_samples is None
    assert load_recipe([str(DIGITS), "--evaluation.samples_per_prompt", "2"])[0].evaluation is not None
    with pytest.raises(ValueError, match=r"evaluation.grid_samples: got 3, want 1 to samples_per_prompt, 2"):
        EvaluationSettings(samples_per_prompt=2, grid_samples=3, rewards=[RewardSettings("ocr")])


def test_home_and_variables_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    made = model(path="~/flux", denoiser="${DATA}/d", prompt_cache="$DATA/cache", start_from="~/lora")
    assert made.start_from == "/home/me/lora"
    assert (made.path, made.denoiser, made.prompt_cache) == ("/home/me/flux", "/data/d", "/data/cache")
    assert model(path="black-forest-labs/FLUX.1-dev").path == "black-forest-labs/FLUX.1-dev"
    whole = recipe(prompts="$DATA/p$.txt", output_dir="~/runs")
    assert (whole.prompts, whole.output_dir) == ("/data/p$.txt", "/home/me/runs")
    rewards = [RewardSettings("hps", args={"path": "~/hps", "template": "$DATA"})]
    assert rewards[0].args == {"path": "/home/me/hps", "template": "$DATA"}
    assert EvaluationSettings(prompts="~/test.txt", rewards=rewards).prompts == "/home/me/test.txt"
    with pytest.raises(ValueError, match=r'^output_dir: got "\$NOWHERE/x" with \$NOWHERE, want it set'):
        recipe(output_dir="$NOWHERE/x")
    with pytest.raises(ValueError, match=r'^rewards.args.path: got "\$\{NOWHERE\}" with \$NOWHERE'):
        RewardSettings("hps", args={"path": "${NOWHERE}"})
    with pytest.raises(ValueError, match=r'^model.path: got "~nobody_at_all/x", want ~ or the name of a user'):
        model(path="~nobody_at_all/x")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("seed: 1\nseed: 2\n", "got seed as in line {0}, want it once"),
        ("train: {iterations: 3}\n", "got train as in line "),
        ("a: [{b: 1, b: 2}]\n", "got b as in line {0}, want it once"),
    ],
)
def test_a_key_stands_once(tmp_path: Path, more: str, message: str) -> None:
    text = DIGITS.read_text()
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("seed:"))
    (tmp_path / "twice.yaml").write_text(text + more)
    line = len(text.splitlines()) + 1
    last = line + (more.count("\n") - 1)
    with pytest.raises(ValueError, match=rf"^recipe: .*twice\.yaml line {last}: {message.format(line)}"):
        load_recipe([str(tmp_path / "twice.yaml")])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.learning_rate", ".inf", "train.learning_rate: got inf, want a finite number"),
        ("--train.learning_rate", ".nan", "train.learning_rate: got nan, want a finite number"),
        ("--train.iterations", "5.5", "recipe: .*: train.iterations: got 5.5, want int$"),
        ("--train.l", "5", "recipe: .*: unrecognized arguments: --train.l 5"),
    ],
)
def test_the_command_line_says_the_same(option: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        load_recipe([str(DIGITS), option, value])


@pytest.mark.parametrize("equals", [True, False])
@pytest.mark.parametrize("names", [["ocr"], ["ocr", "hps"]])
def test_a_list_of_the_command_line_replaces_the_recipes(tmp_path: Path, names: list[str], equals: bool) -> None:
    """One of the same length, too: no field of the recipe's rewards is left."""
    recipe = DIGITS.read_text().replace(
        "\nrewards:\n  - name: digit_probability\n",
        "\nrewards:\n  - name: digit_judge\n    threshold: 0.5\n    label: judged\n",
    )
    assert "judged" in recipe
    (tmp_path / "one.yaml").write_text(recipe)
    given = json.dumps([{"name": name} for name in names])
    option = [f"--rewards={given}"] if equals else ["--rewards", given]
    made, _ = load_recipe([str(tmp_path / "one.yaml"), *option, "--sampler.window", "[0, 1]"])
    assert made.rewards == [RewardSettings(name) for name in names]
    assert made.sampler.window == [0, 1]
