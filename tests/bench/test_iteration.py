"""The plain loop does the trainer's mathematics: the same samples, rewards and weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.iteration import figure
from bench.iteration.__main__ import table
from bench.iteration.plain import PlainLoop
from dancegrpo_fast.models import load_model
from dancegrpo_fast.prompts import load_prompts
from dancegrpo_fast.recipe import Recipe
from dancegrpo_fast.rng import derive_seed
from dancegrpo_fast.train.loop import Trainer

from ..models import cases, folders
from ..tolerances import assert_same_training
from ..train import tiny


@pytest.fixture(scope="module", params=["flux", pytest.param("diffusion", marks=pytest.mark.release)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = tiny.make_flux if request.param == "flux" else tiny.make_diffusion
    return make(tmp_path_factory.mktemp(request.param) / "base")


@pytest.mark.parametrize("rows", [1, 4])
def test_plain_loop_trains_the_same(base: Path, tmp_path: Path, rows: int) -> None:
    # In fewer steps its pictures differ by less than files of 8 bits keep.
    guided = {"guidance_scale": 2.0, "num_steps": 8} if (base / "unet").is_dir() else {}
    assert_trains_the_same(tiny.make_recipe(base, tmp_path / "run", **guided), tmp_path, rows)


@pytest.mark.release
def test_it_does_with_videos_and_lora(tmp_path: Path) -> None:
    """Several rewards, each limited before it is weighted."""
    base = folders.BUILDERS["hunyuan_video"](tmp_path / "hunyuan_video" / "base")
    rewards = [tiny.reward("Brightness", weight=9.0), tiny.reward("Brightness", label="blue", args={"channel": 2})]
    changes: dict[str, Any] = {"rewards": rewards, "lora": True, "micro_batch": 3, "advantage_clip": 1.0}
    recipe = cases.make_recipe(cases.CASES["hunyuan_video"], base, tmp_path / "runs" / "run", **changes)
    assert_trains_the_same(recipe, tmp_path, rows=3)


def assert_trains_the_same(recipe: Recipe, tmp_path: Path, rows: int) -> None:
    """The trainer, and the plain loop with so many rows a call."""
    trainer = Trainer(recipe)
    prompts = load_prompts(recipe.prompts)
    torch.manual_seed(derive_seed(recipe.seed, "weights"))
    model = load_model(recipe, torch.device("cpu"), prompts)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    loop = PlainLoop(recipe, model, prompts, tmp_path, rows)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for number in (1, 2):
            row = trainer.iteration(number)
            mean = loop.iteration(number)
            assert_same_training(torch.tensor(mean), torch.tensor(row["reward/Brightness"]))
    finally:
        dist.destroy_process_group()
    theirs = trainer.accelerator.unwrap_model(trainer.denoiser).state_dict()
    changes = [
        torch.cat([(after[name] - value).flatten() for name, value in before.items()])
        for after in (model.denoiser.state_dict(), theirs)
    ]
    assert_same_training(*changes)


def test_several_updates_are_refused(base: Path, tmp_path: Path) -> None:
    recipe = tiny.make_recipe(base, tmp_path / "run", updates_per_rollout=2)
    model = load_model(recipe, torch.device("cpu"), load_prompts(recipe.prompts))
    with pytest.raises(ValueError, match="one update"):
        PlainLoop(recipe, model, load_prompts(recipe.prompts), tmp_path)


def test_rows_make_the_table_and_the_figure(tmp_path: Path) -> None:
    rows = [
        {
            "recipe": "digits",
            "contender": contender,
            "seconds_median": seconds,
            "seconds": [seconds, seconds],
            "reward": [0.3, 0.4],
            "launches": 10,
            "host_reads": 2,
            "peak_bytes": 3 << 20,
            "flops": 10**9,
            "micro_batch": 4,
        }
        for contender, seconds in (("ours", 1.0), ("batched", 2.0), ("plain", 10.0))
    ]
    assert [line.split("|")[5].strip() for line in table(rows).splitlines()[2:]] == ["10.0x", "5.0x", "1.0x"]
    assert figure.smoothed([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    figure.draw(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size
