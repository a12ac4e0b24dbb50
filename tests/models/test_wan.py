"""What Wan alone does: its schedule, its sizes, and which of its models are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.models import load_model
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.transitions import shifted_sigmas

from ..train.tiny import make_recipe
from . import checks_more as checks
from .folders_more import diffusers, save_wan

WAN: dict[str, Any] = {"family": "wan", "frames": 5, "height": 16, "width": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "base")


def test_the_shift_of_a_multistep_scheduler_is_taken(tmp_path: Path) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    base = save_wan(tmp_path / "base", scheduler)
    recipe = make_recipe(base, tmp_path / "run", prompt_cache=str(tmp_path / "cache"), **WAN)
    model = load_model(recipe, checks.CPU, [Prompt("b", {})])
    assert torch.equal(model.table(recipe.sampler).times, shifted_sigmas(recipe.sampler.num_steps, 5.0)[:-1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"frames": 4}, r"sampler.frames: got 4, want 2 n \+ 1"),
        ({"width": 10}, "sampler: got height 16, width 10, want multiples of 4"),
    ],
)
def test_sizes_that_cannot_be_made(base: Path, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_model(make_recipe(base, tmp_path / "run", **WAN | changes), checks.CPU, [Prompt("b", {})])


def test_two_transformers_are_refused(tmp_path: Path) -> None:
    base = save_wan(tmp_path / "base", boundary_ratio=0.9)
    with pytest.raises(ValueError, match="a Wan of two transformers, want one of one"):
        load_model(make_recipe(base, tmp_path / "run", **WAN), checks.CPU, [Prompt("b", {})])
