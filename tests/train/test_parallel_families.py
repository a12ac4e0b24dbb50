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
RECIPES: dict[str, dict[str, Any]] = {
    "unet-recipe": UNET | RECIPE,
    "first_frames-recipe": SKYREELS | RECIPE | {"block_ops": "lossless"},
    "unet-masters": UNET | RECIPE | {"mixed_precision": "no", "dtype": "bfloat16", "master_dtype": "float32"},
}


@pytest.fixture(scope="module")
def skyreels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.save_skyreels(tmp_path_factory.mktemp("skyreels") / "base")


def recipe(diffusion: Path, skyreels: Path, output: Path, family: str, **changes: Any) -> Any:
    if family != "skyreels_i2v":
        return parallel.recipe(diffusion, output, **changes)
    # Its prompts have pictures beside them.
    case, folder = cases.CASES[family], output.parent / "pictures" / output.name
    return cases.make_recipe(case, skyreels, folder, **{"micro_batch": 2, "output_dir": str(output)} | changes)


@pytest.fixture(scope="module")
def runs(diffusion: Path, skyreels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    wanted = {f"{kind}-{name}": changes for kind in ("ddp", "fsdp") for name, changes in SETTINGS.items()}
    wanted |= {f"fsdp-{name}": changes for name, changes in RECIPES.items()}
    made = {name: recipe(diffusion, skyreels, folder / name, **changes) for name, changes in wanted.items()}
    return parallel.run_together(folder, {name: (name.startswith("fsdp"), one, None) for name, one in made.items()})


@pytest.fixture(scope="module")
def alone(diffusion: Path, skyreels: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    made = {name: recipe(diffusion, skyreels, folder / name, **changes) for name, changes in SETTINGS.items()}
    return parallel.run_alone(made)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one(runs: Path, alone: Alone, kind: str, name: str) -> None:
    parallel.assert_trained_as_one(runs, alone, kind, name)
    # There is one update, which is made again in both for every halving of the loss's scale.
    scale = parallel.rows(runs / f"{kind}-{name}")[0].get("loss_scale", LOSS_SCALE)
    made = 1 + math.log2(LOSS_SCALE / scale)
    assert [rank["reductions"] for rank in parallel.seen(runs, f"{kind}-{name}")] == [made] * WORLD


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
