"""Every family compiled by Inductor: what is drawn and what is replayed have the same bits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..release import release_but
from . import checks
from .cases import CASES, make_recipe

PATCHED: dict[str, Any] = {"block_ops": "lossless"}
LORA: dict[str, Any] = {"lora": True}
# Patched or not, all weights or LoRA, and the policies that a compiled model may have.
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux blocks": ("flux", "blocks", {}),
    "flux blocks lora": (
        "flux",
        "blocks",
        {"checkpointing": "full", "kl_weight": 0.1, "mixed_precision": "bf16"} | PATCHED | LORA,
    ),
    "flux whole": ("flux", "whole", {"checkpointing": "attention", "dtype": "bfloat16"} | PATCHED | LORA),
    "hunyuan_video blocks": ("hunyuan_video", "blocks", {"checkpointing": "full"} | PATCHED | LORA),
    "hunyuan_video whole": ("hunyuan_video", "whole", {"checkpointing": "attention"} | PATCHED),
    "qwen_image blocks": ("qwen_image", "blocks", PATCHED),
    "qwen_image whole": ("qwen_image", "whole", LORA),
    "sd3 blocks": ("sd3", "blocks", PATCHED),
    "sd3 whole": ("sd3", "whole", LORA),
    "stable_diffusion blocks": ("stable_diffusion", "blocks", LORA),
    "stable_diffusion whole": ("stable_diffusion", "whole", {}),
    "wan blocks": ("wan", "blocks", PATCHED | LORA),
    "wan whole": ("wan", "whole", {}),
    "wan_a14b blocks": ("wan_a14b", "blocks", PATCHED | LORA),
}


@pytest.fixture(autouse=True)
def own_compiler() -> Iterator[None]:
    import torch._dynamo as dynamo

    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit", "optimize_ddp")
    with dynamo.config.patch({name: getattr(dynamo.config, name) for name in names}):
        yield
    dynamo.reset()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", release_but(["flux blocks"], RUNS))
def test_ratio_is_one(base: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    family, what, settings = RUNS[name]
    recipe = make_recipe(
        CASES[family], base(family), tmp_path / "run", compile=what, iterations=2, micro_batch=4, **settings
    )
    checks.run(recipe)
