"""Runs whose prompts have unequal lengths, with block ops in "fast" mode: attention by lengths, ratio 1."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.patch import _ragged

from ..release import release_but
from . import checks
from .cases import CASES, make_recipe

FAMILIES = ("hunyuan_video", "skyreels_i2v", "qwen_image", "qwen_image_edit")
SETTINGS: dict[str, dict[str, Any]] = {
    "adapters in pairs": {"lora": True, "micro_batch": 2, "checkpointing": "full", "attention": "auto"},
    "weights in threes": {"micro_batch": 3, "mixed_precision": "bf16", "checkpointing": "attention"},
}
QUICK = (("hunyuan_video", "adapters in pairs"), ("qwen_image", "weights in threes"))


@pytest.mark.parametrize("run", release_but(QUICK, product(FAMILIES, SETTINGS)), ids=", ".join)
def test_ragged_batches_have_ratio_one(
    base: Callable[[str], Path], tmp_path: Path, run: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (family, settings), attend, lengths = run, _ragged.attend, set()

    def watched(*given: Any) -> torch.Tensor:
        lengths.add(given[-1].lengths)
        return attend(*given)

    monkeypatch.setattr("dancegrpo_fast.patch._pieces.attend", watched)
    case = CASES[family]
    more: dict[str, Any] = {"prompts_per_iteration": 3, "group_size": 2, "iterations": 1, "block_ops": "fast"}
    # Where the template alone would be cut, all prompts were equally long.
    more |= {"max_text_tokens": None} if family == "qwen_image" else {}
    checks.run(make_recipe(case, base(family), tmp_path / "run", **more | SETTINGS[settings]))
    assert len(lengths) > 1 and any(len(set(each)) > 1 for each in lengths)
