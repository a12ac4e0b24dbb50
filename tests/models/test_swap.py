"""`model.blocks_to_swap` of a recipe: runs of the same bits, whatever it is combined with, and what is refused."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dancegrpo_fast.activations.streaming import BUFFERS
from dancegrpo_fast.evaluate.weights import load_weights
from dancegrpo_fast.models import load_model
from dancegrpo_fast.models.base import DiffusersModel
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.recipe import LoraSettings, ModelSettings
from dancegrpo_fast.train.loop import Trainer

from ..release import release_but
from ..train.tiny import make_flux, make_recipe
from . import checks, parts
from .test_quantization import without_gpu as without_gpu

BLOCKS = 6
LORA = LoraSettings(rank=2, alpha=2)
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "lora": LORA}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX of two double and four single blocks."""
    folder = make_flux(tmp_path_factory.mktemp("deep") / "base")
    torch.manual_seed(0)
    parts.randomised(parts.flux_transformer(16, num_layers=2, num_single_layers=4)).save_pretrained(  # type: ignore[operator]  # diffusers' method
        folder / "transformer"
    )
    return folder


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"dtype": "float32", "mixed_precision": "bf16", "checkpointing": "full"},
    "mixture": {"checkpointing": "first:3", "block_ops": "lossless", "blocks_to_swap": 1},
    "host inputs": {"checkpointing": "attention", "offload": ["block_inputs", "denoiser", "vae"]},
    "reference and average": {"kl_weight": 0.1, "ema_decay": 0.9, "checkpointing": "full"},
    "guidance": {"guidance_scale": 2.0, "micro_batch": 1},
}


@pytest.mark.parametrize("case", release_but(("plain", "mixture", "host inputs"), CASES))
def test_runs_have_the_same_bits(deep: Path, tmp_path: Path, case: str) -> None:
    options = OPTIONS | {"blocks_to_swap": 3} | CASES[case]
    checks.train(deep, tmp_path / "swapped", **options)
    checks.train(deep, tmp_path / "whole", **options | {"blocks_to_swap": 0, "checkpointing": "none", "offload": []})
    checks.assert_same_weights(tmp_path / "swapped", tmp_path / "whole")


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", release_but(("nf4",), ["nf4", "int8", "fp8"]))
def test_quantised_weights_stream(deep: Path, tmp_path: Path, kind: str, checkpointing: str) -> None:
    options = OPTIONS | {"quantization": kind}
    checks.train(deep, tmp_path / "swapped", blocks_to_swap=3, checkpointing=checkpointing, **options)
    checks.train(deep, tmp_path / "whole", **options)
    checks.assert_same_weights(tmp_path / "swapped", tmp_path / "whole")
