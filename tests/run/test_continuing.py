"""What a continued run may have otherwise, what it is asked for, and what it cannot have."""

import shutil
from pathlib import Path

import pytest
import torch

from dancegrpo_fast.prompts import load_prompts
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.run.identity import prompts_digest
from dancegrpo_fast.train.loop import Trainer

from ..train.tiny import EvaluationSettings, LoraSettings, make_recipe, reward
from .bits import rows
from .continuing import longer, rewrite


def test_other_surroundings_are_warned_about(flux: Path, finished: Path) -> None:
    state = finished / "checkpoints" / "000002" / "state.json"
    rewrite(state, device="another")
    with (
        pytest.warns(UserWarning, match="threads 1, this is 2"),
        pytest.warns(UserWarning, match="device another, this is cpu"),
    ):
        Trainer(longer(flux, finished, threads=2), resume="auto")


def test_another_recipe_is_refused(flux: Path, finished: Path) -> None:
    more = [*make_recipe(flux, finished).rewards, reward("Constant", weight=2.0)]
    narrow = {"dtype": "bfloat16", "master_dtype": "float32"}
    with pytest.raises(ValueError, match=r"resume: .*another recipe; .*seed: got 5, want 0; ") as refused:
        Trainer(make_recipe(flux, finished, seed=5, learning_rate=1.0, rewards=more, **narrow), resume="auto")
    for part in (
        "train.learning_rate: got 1.0, want 0.001",
        'rewards[1]: got {"name": "tests.train.tiny:Constant", "weight": 2.0, ',
        'model.dtype: got "bfloat16", want "float32"',
        " --accept-changes model.dtype,rewards[1],train.learning_rate,train.master_dtype,seed",
    ):
        assert part in str(refused.value)


def test_what_changes_no_result_may_differ(flux: Path, finished: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(flux, tmp_path / "moved")
    cache = {"prompt_cache": str(tmp_path / "cache"), "checkpointing": "full", "memory_gib": 1e3}
    recipe = make_recipe(moved, finished, iterations=3, vae_tiling="off", offload=["vae", "block_inputs"], **cache)
    recipe.prompts = str(shutil.copy(recipe.prompts, tmp_path / "others.jsonl"))
    trainer = Trainer(recipe, resume="auto")
    assert trainer.start == 2
    trainer.run()
    Trainer(make_recipe(flux, tmp_path / "whole", iterations=3)).run()
    ours, wanted = (
        checkpoint.load(run / "checkpoints" / "000003")[0]["model"] for run in (finished, tmp_path / "whole")
    )
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())


def test_other_prompts_are_refused(flux: Path, finished: Path) -> None:
    recipe = make_recipe(flux, finished)
    prompts = Path(recipe.prompts)
    lines = prompts.read_text().splitlines()
    for changed in (lines[::-1], lines[:2], [line.replace('"colour": "red"', '"colour": "rot"') for line in lines]):
        prompts.write_text("\n".join(changed))
        with pytest.raises(ValueError, match=rf'prompts: got "{len(changed)} prompts .*, want "3 prompts .* prompts$'):
            Trainer(recipe, resume="auto")
    prompts.write_text("\n".join(lines))
    assert Trainer(recipe, resume="auto").start == 2


def test_what_says_how_may_differ_and_another_evaluation_is_told(flux: Path, tmp_path: Path) -> None:
    """A reward's class says which of its arguments do; evaluations touch nothing of the training."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "red"}\n')
    evaluation = EvaluationSettings(
        prompts=str(held_out), samples_per_prompt=2, grid_samples=1, rewards=[reward("Brightness")]
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    asked = {"rewards": [reward("Asked", args={"url": "http://a"})]}
    Trainer(make_recipe(flux, run, iterations=1, evaluation=evaluation, **asked)).run()
    held_out.write_text('{"prompt": "green"}\n')
    assert "evaluation has other" in Trainer(make_recipe(flux, run, evaluation=evaluation, **asked), "auto").notes[0]
    moved = {"rewards": [reward("Asked", args={"url": "http://b"})]}
    Trainer(make_recipe(flux, run, **moved), "auto").run()
    Trainer(make_recipe(flux, whole, **asked)).run()
    ours, wanted = (checkpoint.load(one / "checkpoints" / "000002") for one in (run, whole))
    assert all(torch.equal(ours[0]["model"][name], value) for name, value in wanted[0]["model"].items())
    assert ours[1]["changes"] == []
    with pytest.raises(
        ValueError, match=r"rewards\[0\]\.args\.channel: got 1, want null; .*--accept-changes rewards\["
    ):
        Trainer(make_recipe(flux, run, iterations=3, rewards=[reward("Asked", args={"channel": 1})]), "auto")


def test_pictures_count_by_their_file(tmp_path: Path) -> None:
    found = []
    for folder, size in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(b"." * size)
        (tmp_path / folder / "p.jsonl").write_text('{"prompt": "x", "image": "x.png"}')
        found.append(prompts_digest(load_prompts(tmp_path / folder / "p.jsonl")))
    assert found[0] == found[1] != found[2]


def test_another_model_is_refused(flux: Path, finished: Path, tmp_path: Path) -> None:
    other = shutil.copytree(flux, tmp_path / "other")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"shift": 2.0', '"shift": 1.0'))
    with pytest.raises(ValueError, match=r'model\.path: got "another .*scheduler_config\.json", want'):
        Trainer(longer(other, finished), resume="auto")
    with pytest.raises(ValueError, match=r'model\.vae_tiling: got "a VAE that decodes in tiles of 8 pixels"'):
        Trainer(longer(flux, finished, vae_tiling="on"), resume="auto")


def test_gradients_that_are_reduced_otherwise_are_refused(flux: Path, finished: Path) -> None:
    """By what "auto" came to, not by the word."""
    assert Trainer(longer(flux, finished, gradient_sync="auto"), resume="auto").start == 2
    wrong = r'train\.gradient_sync: got "call", want "update"; .* --accept-changes train.gradient_sync'
    with pytest.raises(ValueError, match=wrong):
        Trainer(longer(flux, finished, gradient_sync="call"), resume="auto")
    trainer = Trainer(longer(flux, finished, gradient_sync="call"), "auto", "train.gradient_sync")
    assert trainer.state.identity["gradient_sync"] == "call"
    rewrite(finished / "checkpoints" / "000002" / "state.json", gradient_sync="call")
    with pytest.raises(ValueError, match=r'gradient_sync: got "update", want "call"'):
        Trainer(longer(flux, finished, gradient_sync="auto"), resume="auto")


def test_changes_are_taken_when_asked_for(flux: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = Path((recipe := longer(flux, finished, learning_rate=1e-2, micro_batch=2, ema_decay=0.5)).prompts)
    prompts.write_text(prompts.read_text() + prompts.read_text().splitlines()[0])
    recipe.rewards.append(reward("Constant"))
    for asked in (None, "train", "train.learning_rate,train.ema_decay,prompts,rewards[1]"):
        with pytest.raises(ValueError, match=r"resume: .*another recipe") as refused:
            Trainer(recipe, "auto", asked)
        # What was accepted is in the line that goes on.
        assert f"--accept-changes {asked or ''}" in str(refused.value)
    with pytest.raises(ValueError, match=r'accept-changes: got "learning_rate", want "all" or fields'):
        Trainer(recipe, "auto", "learning_rate")
    with pytest.raises(ValueError, match=r"accept-changes: got all without --resume"):
        Trainer(recipe, None, "all")
    trainer = Trainer(recipe, "auto", "train, prompts,rewards,sampler.eta")
    weights = checkpoint.load(finished / "checkpoints" / "000002")[0]["model"]
    assert trainer.average is not None
    assert all(torch.equal(trainer.average.values[name], value) for name, value in weights.items())
    trainer.run()
    said = capsys.readouterr().out
    assert "from iteration 3 on train.learning_rate is 0.01, was 0.001; bits differ" in said
    assert "accept-changes: sampler.eta did not change" in said
    row = rows(finished / "metrics.jsonl")[2]
    assert row["changes"].keys() == {
        "train.learning_rate",
        "train.micro_batch",
        "train.ema_decay",
        "prompts",
        "rewards[1]",
    }
    assert row["changes"]["train.micro_batch"] == [4, 2]
    # The next continuation knows the new recipe, and keeps what was changed before.
    recipe.train.iterations = 4
    Trainer(recipe, "auto").run()
    assert "changes" not in rows(finished / "metrics.jsonl")[3]
    changes = checkpoint.load_state(finished / "checkpoints" / "000004")["changes"]
    assert {"iteration": 2, "field": "train.learning_rate", "from": 1e-3, "to": 1e-2} in changes and len(changes) == 5
    with pytest.raises(ValueError, match=r"resume: .* holds weights that do not fit; model\.lora: "):
        Trainer(longer(flux, finished, iterations=5, lora=LoraSettings(rank=2)), "auto", "all")
