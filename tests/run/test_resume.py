"""A run that is killed and resumed ends with the bits of one that was not; damaged checkpoints are named."""

import hashlib
import json
import multiprocessing
import shutil
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast import files
from dancegrpo_fast.cli import main
from dancegrpo_fast.prompts import load_prompts
from dancegrpo_fast.recipe import Recipe
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.run.folder import RunDirectory
from dancegrpo_fast.run.identity import prompts_digest
from dancegrpo_fast.train.loop import Trainer

from ..processes import LIMIT
from ..release import release_but
from ..train.tiny import EvaluationSettings, LoraSettings, RewardSettings, make_recipe, reward, write_recipe

RUNNER = """
from dancegrpo_fast.recipe import load_recipe
from dancegrpo_fast.train.loop import Trainer
recipe, options = load_recipe(arguments, resume=None)
Trainer(recipe, options["resume"]).run()
"""
# What every run imports, imported once: processes are forked from one that has it.
IMPORTED = [
    "accelerate",
    "dancegrpo_fast.train.loop",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers",
    "jsonargparse",
    "torch.utils.tensorboard",
]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(IMPORTED)

HOLDER = """
import time
from pathlib import Path
from dancegrpo_fast.run.folder import RunDirectory
RunDirectory(Path(root)).claim()
Path(root, "claimed").touch()
time.sleep(600)
"""

REWARDS = """
import time
class Brightness:
    def __call__(self, inputs):
        time.sleep(0.05)
        return inputs.frames[:, :, 0].mean(dim=(1, 2, 3))
"""


@pytest.fixture
def workspace(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    slow = [RewardSettings("tiny_rewards:Brightness")]
    judged = EvaluationSettings(every=2, samples_per_prompt=3, grid_samples=2, rewards=slow)
    often = {"iterations": 6, "updates_per_rollout": 2, "checkpoint_every": 2}
    recipe = make_recipe(base, tmp_path / "run", rewards=slow, evaluation=judged, timestep_fraction=1.0, **often)
    return write_recipe(recipe, tmp_path / "recipe.yaml").parent


def start(workspace: Path, output: str, *options: str) -> ForkServerProcess:
    arguments = [str(workspace / "recipe.yaml"), "--output_dir", str(workspace / output), *options]
    process = FORKED.Process(target=exec, args=(RUNNER, {"arguments": arguments}))
    process.start()
    return process


def wait(process: ForkServerProcess) -> int | None:
    process.join(LIMIT)
    process.kill()
    process.join()
    return process.exitcode


def lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if key not in ("seconds", "speed")} for row in rows]


@pytest.mark.parametrize("base", release_but(("flux",), ["flux", "diffusion"]), indirect=True)
def test_killed_runs_end_with_the_same_bits(workspace: Path) -> None:
    assert wait(start(workspace, "whole")) == 0
    killed = 0
    # Killed before the first checkpoint, between an evaluation and the checkpoint after it, and after a checkpoint.
    for name, rows in (("metrics", 1), ("evaluations", 3), ("metrics", 5)):
        process = start(workspace, "cut", "--resume", "auto")
        while len(lines(workspace / "cut" / f"{name}.jsonl")) < rows and process.is_alive():
            time.sleep(0.005)
        process.kill()
        killed += wait(process) == -signal.SIGKILL
    assert killed == 3
    assert wait(start(workspace, "cut", "--resume", "auto")) == 0

    whole, cut = workspace / "whole", workspace / "cut"
    assert lines(whole / "metrics.jsonl") == lines(cut / "metrics.jsonl")
    assert len(lines(cut / "metrics.jsonl")) == 6
    assert lines(whole / "evaluations.jsonl") == lines(cut / "evaluations.jsonl")
    for ours, theirs in zip(
        checkpoint.complete(whole / "checkpoints"), checkpoint.complete(cut / "checkpoints"), strict=True
    ):
        for name in ("model", "optimizer", "rng"):
            left, right = checkpoint.load(ours)[0][name], checkpoint.load(theirs)[0][name]
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)


def test_resume_with_lora_kl_and_momentum(base: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lora": LoraSettings(rank=2, alpha=2), "kl_weight": 0.1, "learning_rate": 1e-2}
    Trainer(make_recipe(base, tmp_path / "whole", iterations=4, **changes)).run()
    Trainer(make_recipe(base, tmp_path / "cut", iterations=2, **changes)).run()
    Trainer(make_recipe(base, tmp_path / "cut", iterations=4, **changes), resume="auto").run()
    assert lines(tmp_path / "whole" / "metrics.jsonl") == lines(tmp_path / "cut" / "metrics.jsonl")


@pytest.fixture(scope="module")
def once(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    Trainer(make_recipe(flux, run, keep_checkpoints=3)).run()
    return run


@pytest.fixture
def finished(once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(once, tmp_path / "run")


def longer(base: Path, run: Path, **changes: Any) -> Recipe:
    """The finished run's recipe with an iteration more."""
    return make_recipe(base, run, **{"iterations": 3, "keep_checkpoints": 3} | changes)


def rewrite(state: Path, **changes: Any) -> None:
    """Another `state.json`, as it would have been written."""
    document = json.loads(state.read_text()) | changes
    del document["digest"]
    state.write_text(json.dumps(document | {"digest": checkpoint.digest(document)}))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_checkpoints_are_named(flux: Path, finished: Path, name: str, damage: str) -> None:
    path = finished / "checkpoints" / "000002" / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    rows = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"resume: .*{name} is (damaged|missing); other checkpoints there: 000001"):
        Trainer(longer(flux, finished), resume="auto")
    assert (finished / "metrics.jsonl").read_bytes() == rows
    # The one before it still works, in a directory of its own or once the damaged one is out of the way.
    older = finished / "checkpoints" / "000001"
    with pytest.raises(ValueError, match=r"resume: .*checkpoints 000002"):
        Trainer(make_recipe(flux, finished, keep_checkpoints=3), resume=str(older))
    assert Trainer(make_recipe(flux, finished.parent / "other"), resume=str(older)).start == 1
    elsewhere = shutil.copytree(older, finished.parent / "elsewhere" / "checkpoints" / "000001")
    with pytest.raises(ValueError, match=r"would overwrite"):
        Trainer(make_recipe(flux, finished), resume=str(elsewhere))


def test_what_is_no_checkpoint_is_named(flux: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match=r'resume: got nonsense, want "auto" or the folder of a checkpoint$'):
        Trainer(make_recipe(flux, finished), resume="nonsense")
    with pytest.raises(ValueError, match=rf"resume: got {finished}, want .* run: {finished}/checkpoints/000001, "):
        Trainer(make_recipe(flux, finished), resume=str(finished))
    (file := finished.parent / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir: got .*file, which is a file"):
        Trainer(make_recipe(flux, file), resume="auto")


def test_damaged_state_is_named(flux: Path, finished: Path) -> None:
    state = finished / "checkpoints" / "000002" / "state.json"
    text = state.read_text()
    state.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"resume: .*state\.json is damaged"):
        Trainer(make_recipe(flux, finished), resume="auto")
    state.write_text(text.replace('"iteration": 2', '"iteration": 1'))
    with pytest.raises(ValueError, match=r"resume: .*state\.json is damaged: .*; other checkpoints there: 000001$"):
        Trainer(make_recipe(flux, finished), resume="auto")
    state.write_text(text)
    (finished / "checkpoints" / "000002").rename(finished / "checkpoints" / "000005")
    with pytest.raises(ValueError, match=r"resume: .*000005 holds iteration 2, want the one of its name"):
        Trainer(make_recipe(flux, finished, iterations=6), resume="auto")
    state = finished / "checkpoints" / "000005" / "state.json"
    state.unlink()
    with pytest.raises(ValueError, match=r"resume: .*state\.json is missing"):
        Trainer(make_recipe(flux, finished), resume="auto")


def test_a_torn_last_row_is_dropped_and_another_is_not(flux: Path, finished: Path) -> None:
    metrics = finished / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + whole.splitlines()[-1][: -len(', "seconds": {}}')])
    Trainer(longer(flux, finished), resume="auto")
    assert metrics.read_text() == whole
    for damage in (b"{", b"[]\n", b"\xff\n"):
        metrics.write_bytes(damage + whole.encode())
        with pytest.raises(ValueError, match=r"output_dir: .*metrics\.jsonl (line 1 )?is damaged"):
            RunDirectory(finished).keep_until(2)
        assert metrics.read_bytes() == damage + whole.encode()


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
    with pytest.raises(ValueError, match=r'model\.vae_tiling: got "a VAE that decodes in tiles"'):
        Trainer(longer(flux, finished, vae_tiling="on"), resume="auto")


def test_changes_are_taken_when_asked_for(flux: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = Path((recipe := longer(flux, finished, learning_rate=1e-2, micro_batch=2, ema_decay=0.5)).prompts)
    prompts.write_text(prompts.read_text() + prompts.read_text().splitlines()[0])
    recipe.rewards.append(reward("Constant"))
    for asked in (None, "train", "train.learning_rate,train.ema_decay,prompts,rewards[1]"):
        with pytest.raises(ValueError, match=r"resume: .*another recipe"):
            Trainer(recipe, "auto", asked)
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
    row = lines(finished / "metrics.jsonl")[2]
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
    assert "changes" not in lines(finished / "metrics.jsonl")[3]
    changes = checkpoint.load_state(finished / "checkpoints" / "000004")["changes"]
    assert {"iteration": 2, "field": "train.learning_rate", "from": 1e-3, "to": 1e-2} in changes and len(changes) == 5
    for settings in ({"family": "sd3"}, {"lora": LoraSettings(rank=2)}):
        with pytest.raises(ValueError, match=r"resume: .* holds weights that do not fit; model\.(family|lora): "):
            Trainer(longer(flux, finished, iterations=5, **settings), "auto", "all")


def test_lost_rows_are_named(flux: Path, finished: Path, tmp_path: Path) -> None:
    metrics = finished / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[1] + "\n")
    trainer = Trainer(longer(flux, finished, iterations=4), resume="auto")
    assert trainer.notes == [
        f"{metrics} lacks the rows of 1 iterations, from 1 to 1; they are lost, the weights are as they were"
    ]
    # Rows of a run that continues elsewhere begin there.
    first = finished / "checkpoints" / "000001"
    Trainer(make_recipe(flux, tmp_path / "other"), resume=str(first)).run()
    assert Trainer(longer(flux, tmp_path / "other"), resume="auto").notes == []


def test_a_checkpoint_of_the_first_format_goes_on(flux: Path, finished: Path, tmp_path: Path) -> None:
    """With SHA-256 of whole files, none of `state.json`, and fewer fields."""
    folder = finished / "checkpoints" / "000002"
    state = json.loads((folder / "state.json").read_text())
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    for name in ("crc32", "digest", "first_row", "changes"):
        del state[name]
    del state["recipe"]["model"]["max_text_tokens"], state["recipe"]["rewards"][0]["win_rate"]
    (folder / "state.json").write_text(json.dumps(state | {"format": 1, "sha256": hashes}))
    Trainer(longer(flux, finished), resume="auto").run()
    Trainer(make_recipe(flux, tmp_path / "whole", iterations=3)).run()
    ours, wanted = (checkpoint.load(run / "checkpoints" / "000003")[0] for run in (finished, tmp_path / "whole"))
    assert all(torch.equal(ours[group][name], one) for group in wanted for name, one in wanted[group].items())
    data = (path := folder / "model.safetensors").read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.load(folder)


def test_large_groups_are_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE", 100)
    monkeypatch.setattr(checkpoint, "CHUNK", 64)
    monkeypatch.setattr(files, "CHUNK", 64)
    group = {
        "a": torch.rand(20),
        "b": torch.rand(3, 4),
        "c": torch.tensor(1),
        "d": torch.rand(0, 2),
        "e": torch.rand(99),
    }
    folder = checkpoint.save(tmp_path, 7, {"model": group}, {})
    assert [path.name for path in sorted((folder / "model").iterdir())] == [
        f"00000-0000{n}.safetensors" for n in range(3)
    ]
    found = checkpoint.load(folder)[0]["model"]
    assert found.keys() == group.keys() and all(torch.equal(found[name], value) for name, value in group.items())
    part = checkpoint.stored(folder)[0]["model"]["b"]
    assert part.shape == (3, 4) and torch.equal(part[1:3, slice(None)], group["b"][1:3])
    data = bytearray((last := folder / "model" / "00000-00002.safetensors").read_bytes())
    for place in range(0, len(data), 50):
        last.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"model/00000-00002\.safetensors is damaged"):
            checkpoint.load(folder)


def test_a_finished_run_is_left_alone(flux: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}

    before = written()
    command = ["train", str(write_recipe(make_recipe(flux, finished), finished.parent / "recipe.yaml"))]
    assert main([*command, "--resume", "auto"]) == 0
    said = capsys.readouterr().out
    assert "tiny: all 2 iterations are done, for more raise train.iterations" in said
    assert f"everything is in {finished}" in said
    assert written() == before
    # A crash may have come between the last checkpoint and the model, or left an earlier one.
    for damage in (lambda: shutil.rmtree(finished / "model"), lambda: (finished / "model" / "saved.json").unlink()):
        damage()
        Trainer(make_recipe(flux, finished, keep_checkpoints=3), resume="auto").run()
        assert (finished / "model" / "transformer" / "config.json").is_file()
        assert RunDirectory(finished).saved("model") == 2
    assert lines(finished / "metrics.jsonl")[1]["iteration"] == 2
    with pytest.raises(ValueError, match=r"train\.iterations: got 1, want at least the 2 of .*000002"):
        Trainer(make_recipe(flux, finished, iterations=1), resume="auto")


def test_half_written_checkpoints_are_ignored_and_removed(flux: Path, finished: Path) -> None:
    stale = finished / "checkpoints" / ".000009.1"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    trainer = Trainer(make_recipe(flux, finished, iterations=3), resume="auto")
    assert trainer.start == 2
    trainer.run()
    assert not stale.exists()
    assert [path.name for path in checkpoint.complete(finished / "checkpoints")] == ["000002", "000003"]


def test_a_folder_is_one_runs(workspace: Path) -> None:
    """Two runs in a folder would drop each other's rows; a killed one keeps nobody out."""
    root = workspace / "run"
    holder = FORKED.Process(target=exec, args=(HOLDER, {"root": str(root)}))
    holder.start()
    while not (root / "claimed").exists() and holder.is_alive():
        time.sleep(0.05)
    for resume in (None, "auto"):
        with pytest.raises(ValueError, match=r"output_dir: got .*run, where a run is going on"):
            Trainer(make_recipe(workspace / "base", root), resume)
    holder.kill()
    holder.join()
    assert RunDirectory(root).claim() is None
    assert RunDirectory(root).claim() is None
