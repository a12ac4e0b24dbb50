"""What Qwen-Image alone does: text as long as the run's longest prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.models import load_model
from dancegrpo_fast.prompts import Prompt

from ..train.tiny import make_recipe
from . import checks_more as checks
from .folders_more import save_qwen_image

QWEN: dict[str, Any] = {"family": "qwen_image"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen_image(tmp_path_factory.mktemp("qwen") / "base")


def test_text_is_as_long_as_the_longest_prompt_of_the_run(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(base, tmp_path / "run", prompt_cache=str(tmp_path / "cache"), **QWEN)
    short, longer = Prompt("b", {}), Prompt("a red fox", {})
    both = load_model(recipe, checks.CPU, [short, longer])
    lengths = [both.encode([prompt])["prompt_embeds"].shape[1] for prompt in (short, longer)]
    used = [int(both.encode([prompt])["prompt_embeds_mask"].sum()) for prompt in (short, longer)]
    assert lengths == [used[1]] * 2 and used[1] - used[0] == len("a red fox") - len("b")
    alone = load_model(recipe, checks.CPU, [short]).encode([short])["prompt_embeds"]
    assert torch.equal(both.encode([short])["prompt_embeds"][:, : used[0]], alone)
