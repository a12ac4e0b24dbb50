"""`model.blocks_to_swap` of a recipe: runs of the same bits, whatever it is combined with, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.activations.streaming import BUFFERS
from dancegrpo_fast.evaluate.weights import load_weights
from dancegrpo_fast.memory.planning.planner import plan
from dancegrpo_fast.models import load_model
from dancegrpo_fast.profile.profiler import profile_recipe
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.recipe import LoraSettings, ModelSettings, Recipe
from dancegrpo_fast.train.loop import Trainer

from ..release import release_but
from ..tolerances import PREDICTED_BYTES
from ..train.test_parallel import run_together
from ..train.tiny import make_flux, make_recipe, write_recipe
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
}


@pytest.mark.parametrize("case", release_but(("plain", "mixture"), CASES))
def test_runs_have_the_same_bits(deep: Path, tmp_path: Path, case: str) -> None:
    options = OPTIONS | {"blocks_to_swap": 3} | CASES[case]
    checks.train(deep, tmp_path / "swapped", **options)
    checks.train(deep, tmp_path / "whole", **options | {"blocks_to_swap": 0, "checkpointing": "none", "offload": []})
    checks.assert_same_weights(tmp_path / "swapped", tmp_path / "whole")


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("checkpointing", release_but(("full",), ["none", "full"]))
@pytest.mark.parametrize("kind", release_but(("nf4",), ["nf4", "int8", "fp8"]))
def test_quantised_weights_stream(deep: Path, tmp_path: Path, kind: str, checkpointing: str) -> None:
    options = OPTIONS | {"quantization": kind}
    checks.train(deep, tmp_path / "swapped", blocks_to_swap=3, checkpointing=checkpointing, **options)
    checks.train(deep, tmp_path / "whole", **options)
    checks.assert_same_weights(tmp_path / "swapped", tmp_path / "whole")


@pytest.mark.release
def test_two_processes_swap(deep: Path, tmp_path: Path) -> None:
    small = {"prompts_per_iteration": 2, "group_size": 2, "micro_batch": 2, "num_steps": 3}
    options = OPTIONS | small | {"checkpointing": "attention"}
    cases = {name: make_recipe(deep, tmp_path / name, blocks_to_swap=n, **options) for name, n in (("a", 0), ("b", 3))}
    run_together(tmp_path, {name: (False, recipe, None) for name, recipe in cases.items()})
    checks.assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.release
def test_auto_swaps_what_has_to(deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = OPTIONS | {"checkpointing": "full", "vae_tiling": "off"}
    recipe = checks.small_recipe(deep, tmp_path / "run", **fixed)
    asked = checks.pieces(recipe, load(recipe))
    whole = plan(asked.settings, advise=False).peak_bytes
    block = asked.rest.weights["parameters"] // 10
    chosen = []
    for name, size in (("whole", whole), ("swapped", whole - block)):
        gib = checks.least_gib(asked, size + 64)
        checks.train(deep, tmp_path / name, blocks_to_swap="auto", memory_gib=gib, **fixed)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("blocks_to_swap "))
        chosen.append(int(line.removeprefix("blocks_to_swap ").partition(":")[0]))
    assert chosen[0] == 0 and 1 <= chosen[1] < BLOCKS - BUFFERS
    checks.assert_same_weights(tmp_path / "whole", tmp_path / "swapped")


def load(recipe: Recipe, training: bool = True) -> Any:
    return load_model(recipe, checks.CPU, [Prompt("red", {})], training=training)


def test_a_run_goes_on_swapped_and_is_evaluated(deep: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    checks.train(deep, whole, **OPTIONS)
    Trainer(checks.small_recipe(deep, parted, iterations=1, **OPTIONS)).run()
    recipe = checks.small_recipe(deep, parted, blocks_to_swap=3, **OPTIONS)
    Trainer(recipe, resume="auto").run()
    checks.assert_same_weights(whole, parted)
    outputs = []
    for count, run in ((0, whole), (3, parted)):
        model = load(replace(recipe, model=replace(recipe.model, blocks_to_swap=count)), training=False)
        load_weights(model, run)
        torch.manual_seed(0)
        latents = torch.randn(1, *model.latent_shape)
        rows = latents, torch.tensor([0.5]), model.encode([Prompt("red", {})]), None, 1.0
        with torch.no_grad():
            outputs.append(model.predict(model.denoiser, *rows)[0])
    assert torch.equal(*outputs)


def test_what_a_swapped_run_takes_is_predicted(deep: Path, tmp_path: Path) -> None:
    recipe = checks.small_recipe(deep, tmp_path / "run", checkpointing="full", blocks_to_swap=3, **OPTIONS)
    report = profile_recipe(write_recipe(recipe, tmp_path / "recipe.yaml"))
    for name in ("rollout", "decode", "replay forward", "replay backward", "optimizer"):
        assert report.deviation(name) == pytest.approx(0, abs=PREDICTED_BYTES), (name, report.table())


def test_bad_input(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.blocks_to_swap: got 3 without model.lora, want both, or 0: only"):
        ModelSettings("flux", "folder", blocks_to_swap=3)
    with pytest.raises(ValueError, match=r"model.blocks_to_swap: got -1, want at least 0"):
        ModelSettings("flux", "folder", lora=LORA, blocks_to_swap=-1)
    with pytest.raises(ValueError, match=r'model.blocks_to_swap: got "all", want a whole number or "auto"'):
        ModelSettings("flux", "folder", lora=LORA, blocks_to_swap="all")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match=r"model.blocks_to_swap: got 5, want 1 to 4, 2 less than there are"):
        load(make_recipe(deep, tmp_path / "run", blocks_to_swap=5, **OPTIONS))
    with pytest.raises(ValueError, match=r'model.blocks_to_swap: got "auto" on the CPU, want model.memory_gib'):
        load(make_recipe(deep, tmp_path / "run", blocks_to_swap="auto", **OPTIONS))
