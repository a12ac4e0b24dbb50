"""Two gloo processes that train other families than FLUX, and with what the recipes for several GPUs have."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.train.optimizer import LOSS_SCALE

from ..models import cases, folders
from . import test_parallel as parallel
from .test_parallel import WORLD, Alone
from .tiny import LoraSettings

pytestmark = [parallel.GLOO, pytest.mark.release]

SMALL: dict[str, Any] = {"prompts_per_iteration": 2, "group_size": 2, "num_steps": 3, "iterations": 1}
# Both are guided by the second half of every call; the latter's prompts have pictures.
UNET: dict[str, Any] = SMALL | {"family": "stable_diffusion", "guidance_scale": 5.0}
SKYREELS: dict[str, Any] = SMALL | {"family": "skyreels_i2v"}
SETTINGS: dict[str, dict[str, Any]] = {
    "unet": UNET,
    "unet-lora": UNET | {"lora": LoraSettings(rank=2, alpha=2)},
    "unet-float16": UNET | {"lora": LoraSettings(rank=2, alpha=2), "dtype": "float16"},
    "first_frames": SKYREELS,
    "first_frames-lora": SKYREELS | {"lora": True},
}
# What the recipes for several GPUs have, and an average.
RECIPE: dict[str, Any] = {
    "mixed_precision": "bf16",
    "gradient_sync": "call",
    "ema_decay": 0.5,
    "checkpointing": "auto",
    "memory_gib": 4.0,
    "attention": "auto",
}
# Under DDP alone: Wan of two transformers, one of which has no call in some process or update.
EXPERTS: dict[str, Any] = SMALL | {"family": "wan", "folder": "wan_a14b", "micro_batch": 1, "updates_per_rollout": 2}
UNSHARDED: dict[str, dict[str, Any]] = {
    "experts": EXPERTS | {"prompts_per_iteration": 3},
    "experts-lora": EXPERTS | {"lora": True, "kl_weight": 0.1, "gradient_sync": "call"},
    "experts-frozen": EXPERTS | {"lora": True, "second_expert": "frozen", "timestep_fraction": 1.0},
}
RECIPES: dict[str, dict[str, Any]] = {
    "unet-recipe": UNET | RECIPE,
    "first_frames-recipe": SKYREELS | RECIPE | {"block_ops": "lossless"},
    "unet-masters": UNET | RECIPE | {"mixed_precision": "no", "dtype": "bfloat16", "master_dtype": "float32"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with text encoders."""
    root = tmp_path_factory.mktemp("whole")
    return {name: folders.BUILDERS[name](root / name / "base") for name in ("skyreels_i2v", "wan_a14b")}


def recipe(diffusion: Path, whole: dict[str, Path], output: Path, family: str, folder: str = "", **changes: Any) -> Any:
    name = folder or family
    if name not in whole:
        return parallel.recipe(diffusion, output, **changes)
    # Prompts of their own, some with pictures beside them.
    place = output.parent / f"prompts-{name}" / output.name
    fixed = {"micro_batch": 2, "output_dir": str(output)}
    return cases.make_recipe(cases.CASES[name], whole[name], place, **fixed | changes)


@pytest.fixture(scope="module")
def runs(diffusion: Path, whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    wanted = {f"{kind}-{name}": changes for kind in ("ddp", "fsdp") for name, changes in SETTINGS.items()}
    wanted |= {f"ddp-{name}": changes for name, changes in UNSHARDED.items()}
    wanted |= {f"fsdp-{name}": changes for name, changes in RECIPES.items()} | {"fsdp-experts": EXPERTS}
    wanted |= {"ddp-turns": EXPERTS | {"lora": True, "offload": ["expert"]}}
    made = {name: recipe(diffusion, whole, folder / name, **changes) for name, changes in wanted.items()}
    return parallel.run_together(folder, {name: (name.startswith("fsdp"), one, None) for name, one in made.items()})


@pytest.fixture(scope="module")
def alone(diffusion: Path, whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    wanted = SETTINGS | UNSHARDED
    made = {name: recipe(diffusion, whole, folder / name, **changes) for name, changes in wanted.items()}
    return parallel.run_alone(made)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one(runs: Path, alone: Alone, kind: str, name: str) -> None:
    parallel.assert_trained_as_one(runs, alone, kind, name)
    # There is one update, which is made again in both for every halving of the loss's scale.
    scale = parallel.rows(runs / f"{kind}-{name}")[0].get("loss_scale", LOSS_SCALE)
    made = 1 + math.log2(LOSS_SCALE / scale)
    assert [rank["reductions"] for rank in parallel.seen(runs, f"{kind}-{name}")] == [made] * WORLD


@pytest.mark.parametrize("name", UNSHARDED)
def test_two_denoisers_are_trained_as_one_process_does(runs: Path, alone: Alone, name: str) -> None:
    parallel.assert_trained_as_one(runs, alone, "ddp", name)
    _, before, after = alone[name]
    moved = {key.partition(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved == ({"transformer"} if "frozen" in name else {"transformer", "transformer_2"})


def test_two_denoisers_are_not_split(runs: Path) -> None:
    for name, message in (("fsdp-experts", "accelerate: got FSDP2 for "), ("ddp-turns", 'train.offload: got "expert"')):
        assert all(rank["error"].startswith(message) for rank in parallel.seen(runs, name))


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_settings_of_other_families(runs: Path, name: str) -> None:
    one, two = parallel.seen(runs, f"fsdp-{name}")
    parallel.assert_same_bits(one["weights"], two["weights"])
    (row,) = parallel.rows(runs / f"fsdp-{name}")
    assert row["ratio_first_update_max_dev"] == 0.0
    assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0.0
    kept = parallel.newest(runs / f"fsdp-{name}")
    assert kept["model"].keys() == kept["ema"].keys()
    assert any(not torch.equal(kept["ema"][key], value) for key, value in kept["model"].items())
