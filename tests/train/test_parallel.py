"""Two gloo processes, DDP and FSDP2, through the one trainer: the samples, updates and files of one process."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dancegrpo_fast.processes import Processes, share
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.loop import Trainer

from ..models import cases, folders
from ..processes import together
from ..tolerances import REORDERED_SUMS, assert_same_training
from .tiny import EvaluationSettings, LoraSettings, make_recipe, reward

WORKER = Path(__file__).with_name("parallel_worker.py")
WORLD = 2
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")

SMALL: dict[str, Any] = {"prompts_per_iteration": 2, "group_size": 2, "num_steps": 3, "iterations": 1}
# Both are guided by the second half of every call; the latter's prompts have pictures.
UNET: dict[str, Any] = SMALL | {"family": "stable_diffusion", "guidance_scale": 5.0}
SKYREELS: dict[str, Any] = SMALL | {"family": "skyreels_i2v"}
SETTINGS: dict[str, dict[str, Any]] = {
    # Whole prompts on each process.
    "even": {
        "prompts_per_iteration": 2,
        "updates_per_rollout": 2,
        "ema_decay": 0.5,
        "evaluation": EvaluationSettings(samples_per_prompt=2, grid_samples=2, rewards=[reward("Brightness")]),
    },
    # 9 samples, of which the middle prompt's are split; of the six trained on, any number may be on a process.
    "uneven": {"group_size": 3, "best_of_n": 1, "window": [1, 2], "iterations": 1, "timestep_fraction": 1.0},
    # The second process has no gradient.
    "lonely": {"prompts_per_iteration": 2, "rewards": [reward("FirstGroup")]},
    "lora": {
        "prompts_per_iteration": 2,
        "lora": LoraSettings(rank=2, alpha=2),
        "kl_weight": 0.1,
        "checkpointing": "full",
    },
    # A reference model of its own, and gradients that are reduced in every call.
    "kl": {"prompts_per_iteration": 2, "kl_weight": 0.1, "gradient_sync": "call"},
    "unet": UNET,
    "unet-lora": UNET | {"lora": LoraSettings(rank=2, alpha=2)},
    "first_frames": SKYREELS,
    "first_frames-lora": SKYREELS | {"lora": True},
}
BF16: dict[str, Any] = {"prompts_per_iteration": 2, "mixed_precision": "bf16", "iterations": 1}
# What the recipes for several GPUs have, and an average.
RECIPE: dict[str, Any] = {
    "mixed_precision": "bf16",
    "gradient_sync": "call",
    "ema_decay": 0.5,
    "checkpointing": "auto",
    "memory_gib": 4.0,
    "attention": "auto",
}
RECIPES: dict[str, dict[str, Any]] = {
    "unet-recipe": UNET | RECIPE,
    "first_frames-recipe": SKYREELS | RECIPE | {"block_ops": "lossless"},
}


def recipe(bases: dict[str, Path], output: Path, family: str = "flux", **changes: Any) -> Any:
    if family != "skyreels_i2v":
        return make_recipe(bases[family], output, **{"micro_batch": 2} | changes)
    # Its prompts have pictures beside them.
    made = cases.make_recipe(
        cases.CASES[family], bases[family], output.parent / "pictures" / output.name, **{"micro_batch": 2} | changes
    )
    made.output_dir = str(output)
    return made


@pytest.fixture(scope="module")
def bases(flux: Path, diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the families."""
    skyreels = folders.save_skyreels(tmp_path_factory.mktemp("skyreels") / "base")
    return {"flux": flux, "stable_diffusion": diffusion, "skyreels_i2v": skyreels}


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of two processes."""
    folder = tmp_path_factory.mktemp("parallel")
    whole: dict[str, Any] = {}

    def add(name: str, sharded: bool, resume: str | None = None, **changes: Any) -> None:
        made = recipe(bases, folder / name, **changes).as_dict()
        for one in (*made["rewards"], *(made["evaluation"] or {"rewards": []})["rewards"]):
            one["name"] = "tests.train.tiny:" + one["name"].rpartition(":")[2]
        whole[name] = {"sharded": sharded, "recipe": made, "resume": resume}

    for kind, sharded in (("ddp", False), ("fsdp", True)):
        for name, changes in SETTINGS.items():
            add(f"{kind}-{name}", sharded, **changes)
        add(f"{kind}-resumed", sharded, str(folder / f"{kind}-even" / "checkpoints" / "000001"), **SETTINGS["even"])
        add(f"{kind}-replica", sharded, rollout_replica=True, **BF16)
        add(f"{kind}-win_rate", sharded, rewards=[reward("Brightness", win_rate=True)])
    add("fsdp-bf16", True, **BF16)
    for name, changes in RECIPES.items():
        add(f"fsdp-{name}", True, **changes)
    (folder / "cases.json").write_text(json.dumps(whole))
    together([[sys.executable, str(WORKER), str(rank), str(folder)] for rank in range(WORLD)], folder)
    return folder


@pytest.fixture(scope="module")
def alone(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Where one process ran each of the settings, its weights before and after."""
    from accelerate.state import AcceleratorState

    folder, found = tmp_path_factory.mktemp("alone"), {}
    for name, changes in SETTINGS.items():
        trainer = Trainer(recipe(bases, folder / name, **changes))
        before = {key: p.detach().clone() for key, p in trainer.parameters.items()}
        trainer.run()
        found[name] = folder / name, before, {key: p.detach().clone() for key, p in trainer.parameters.items()}
        AcceleratorState._reset_state(reset_partial_state=True)
    return found


def seen(runs: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(runs / f"{name}.{rank}.pt", weights_only=True) for rank in range(WORLD)]


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def newest(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return checkpoint.load(checkpoint.complete(folder / "checkpoints")[-1])[0]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 0
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one(runs: Path, alone: dict[str, Any], kind: str, name: str) -> None:
    folder, before, after = alone[name]
    ranks = seen(runs, f"{kind}-{name}")
    assert ranks[0]["name"] == f"2 processes ({'FSDP2' if kind == 'fsdp' else 'DDP'})"
    assert_same_bits(ranks[0]["weights"], ranks[1]["weights"])
    changed = [
        torch.cat([(weights[key] - start).flatten() for key, start in before.items()])
        for weights in (ranks[0]["weights"], after)
    ]
    assert_same_training(*changed)

    ours, theirs = rows(folder), rows(runs / f"{kind}-{name}")
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert two["ratio_first_update_max_dev"] == 0.0
        assert one.keys() == two.keys() and one["pairs"] == two["pairs"]
        assert one["skipped"]["zero_advantage_skipped"] == two["skipped"]["zero_advantage_skipped"]
        for key in {"reward/Brightness", "reward/FirstGroup", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=REORDERED_SUMS)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_settings_of_other_families(runs: Path, name: str) -> None:
    one, two = seen(runs, f"fsdp-{name}")
    assert_same_bits(one["weights"], two["weights"])
    (row,) = rows(runs / f"fsdp-{name}")
    assert row["ratio_first_update_max_dev"] == 0.0
    assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0.0
    kept = newest(runs / f"fsdp-{name}")
    assert kept["model"].keys() == kept["ema"].keys()
    assert any(not torch.equal(kept["ema"][key], value) for key, value in kept["model"].items())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_reduced_once_per_update(runs: Path, kind: str) -> None:
    others = [(name, 1) for name in SETTINGS if name.startswith(("unet", "first_frames"))]
    for name, updates in (("even", 4), ("uneven", 1), ("lonely", 2), ("lora", 2), *others):
        assert [rank["reductions"] for rank in seen(runs, f"{kind}-{name}")] == [updates] * WORLD
    # Two processes with the same number of calls of full micro-batches; each of them is reduced.
    (one, two), calls = seen(runs, f"{kind}-kl"), rows(runs / f"{kind}-kl")
    assert one["reductions"] == two["reductions"] == sum(row["skipped"]["model_rows"] for row in calls) // 2 // WORLD


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["even", "uneven"])
def test_samples_are_divided(runs: Path, kind: str, name: str) -> None:
    one, two = (rank["kept"] for rank in seen(runs, f"{kind}-{name}"))
    batch = 8 if name == "even" else 9
    for (first, chosen), (second, also) in zip(one, two, strict=True):
        assert chosen == also == [*first, *second]
        assert set(first) <= set(share(batch, 0, WORLD)) and set(second) <= set(share(batch, 1, WORLD))


@pytest.mark.parametrize(("count", "processes"), [(8, 2), (9, 2), (24, 5), (3, 3)])
def test_shares_are_whole_and_even(count: int, processes: int) -> None:
    parts = [share(count, index, processes) for index in range(processes)]
    assert [place for part in parts for place in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_evaluations_are_those_of_one_process(runs: Path, alone: dict[str, Any], kind: str) -> None:
    ours, theirs = rows(alone["even"][0], "evaluations"), rows(runs / f"{kind}-even", "evaluations")
    assert len(ours) == len(theirs) == 4
    # Before training there is nothing to round.
    assert ours[:2] == theirs[:2]
    for one, two in zip(ours[2:], theirs[2:], strict=True):
        assert one.pop("sampler") == two.pop("sampler")
        assert one == pytest.approx(two, rel=REORDERED_SUMS)
    for path in (alone["even"][0] / "samples").iterdir():
        assert (runs / f"{kind}-even" / "samples" / path.name).is_file()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resumed_runs_end_with_the_same_bits(runs: Path, kind: str) -> None:
    whole, resumed = newest(runs / f"{kind}-even"), newest(runs / f"{kind}-resumed")
    assert whole.keys() == resumed.keys() == {"model", "optimizer", "ema", "rng"}
    for group, tensors in whole.items():
        assert_same_bits(resumed[group], tensors)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_another_number_of_processes_resumes_with_a_warning(
    bases: dict[str, Path], runs: Path, kind: str, tmp_path: Path
) -> None:
    folder = runs / f"{kind}-even" / "checkpoints" / "000001"
    made = recipe(bases, tmp_path / "run", **SETTINGS["even"])
    made.prompts = json.loads((runs / "cases.json").read_text())[f"{kind}-even"]["recipe"]["prompts"]
    for one in (*made.rewards, *made.evaluation.rewards):
        one.name = "tests.train.tiny:" + one.name.rpartition(":")[2]
    with pytest.warns(UserWarning, match="processes 2 processes .*, this is one process"):
        trainer = Trainer(made, resume=str(folder))
    tensors = checkpoint.load(folder)[0]
    assert trainer.start == 1 and trainer.average is not None
    assert_same_bits({name: p.detach() for name, p in trainer.parameters.items()}, tensors["model"])
    assert_same_bits(trainer.average.values, tensors["ema"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_saved_models_are_whole(runs: Path, kind: str) -> None:
    from diffusers import FluxTransformer2DModel

    run = runs / f"{kind}-even"
    for folder, group in (("model", "model"), ("model_ema", "ema")):
        loaded = FluxTransformer2DModel.from_pretrained(run / folder, subfolder="transformer")
        assert_same_bits(dict(loaded.named_parameters()), newest(run)[group])
    lora = runs / f"{kind}-lora" / "model" / "pytorch_lora_weights.safetensors"
    from safetensors.torch import load_file

    saved, trained = load_file(lora), newest(runs / f"{kind}-lora")["model"]
    assert sorted(value.sum().item() for value in saved.values()) == sorted(v.sum().item() for v in trained.values())


def test_a_resident_copy_changes_nothing(runs: Path) -> None:
    plain, resident = newest(runs / "fsdp-bf16"), newest(runs / "fsdp-replica")
    for group, tensors in plain.items():
        assert_same_bits(resident[group], tensors)
    for name in ("fsdp-bf16", "fsdp-replica"):
        assert [row["ratio_first_update_max_dev"] for row in rows(runs / name)] == [0.0]


def test_what_processes_cannot_do_is_refused(runs: Path) -> None:
    for rank in seen(runs, "ddp-replica"):
        assert rank["error"] == "train.rollout_replica: got true in 2 processes (DDP), want FSDP2, or false"
    for kind in ("ddp", "fsdp"):
        for rank in seen(runs, f"{kind}-win_rate"):
            assert rank["error"].startswith("train.prompts_per_iteration: got 3 on 2 processes, want a multiple")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: got 1"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: got true"),
        ({"FSDP_VERSION": "2"}, "got FSDP without a process group"),
    ],
    ids=["version", "offload", "alone"],
)
def test_other_settings_of_fsdp_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    for name, value in (settings | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Processes("no", tmp_path)
