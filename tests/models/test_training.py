"""Every family in training, all of it and with LoRA: what must not change a bit of its weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..release import release_but
from . import checks
from .cases import CASES, make_recipe
from .folders import load_pipeline

# As the paper's recipes have it, which train all weights, and a LoRA of low precision throughout.
RECIPES: dict[bool, dict[str, Any]] = {False: {"mixed_precision": "bf16"}, True: {"dtype": "bfloat16"}}
PATCHED = {"block_ops": "lossless"}
POLICIES = ("full", "attention", "matmul", "first:1", "auto")
# Of Wan's two transformers test_experts.py has one of each kind of check.
families = pytest.mark.parametrize("family", release_but(CASES.keys() - {"wan_a14b"}, CASES))
parts = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@pytest.fixture(scope="module")
def run(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Where a family was trained with some settings, once for all tests that ask for the same."""
    from accelerate.state import AcceleratorState

    made: dict[str, Path] = {}

    def trained(family: str, interrupted: bool = False, **changes: Any) -> Path:
        """`interrupted`: by a run that ends after the first of the iterations and is resumed."""
        name = f"{family}-{interrupted}-{sorted(changes.items())}"
        if name not in made:
            case, output = CASES[family], tmp_path_factory.mktemp(family) / "run"
            if family == "stable_diffusion":
                changes.pop("block_ops", None)
            for part in (1, 2) if interrupted else (changes.get("iterations", 2),):
                recipe = make_recipe(case, base(family), output, **changes | {"iterations": part})
                checks.run(recipe, "auto" if interrupted and part == 2 else None)
                AcceleratorState._reset_state(reset_partial_state=True)
            made[name] = output
        return made[name]

    return trained


@pytest.mark.pairs
@families
@parts
@pytest.mark.parametrize("micro_batch", release_but((4,), [1, 4]))
def test_neither_block_ops_nor_resuming_change_a_bit(
    run: Callable[..., Path], family: str, lora: bool, micro_batch: int
) -> None:
    plain = run(family, lora=lora, micro_batch=micro_batch)
    first, second = checks.weights(plain, 1), checks.weights(plain, 2)
    assert any(not torch.equal(first[name], value) for name, value in second.items())
    checks.assert_same_weights(plain, run(family, True, lora=lora, micro_batch=micro_batch, **PATCHED))


@pytest.mark.parametrize("family", release_but(("sd3",), ("stable_diffusion", "sd3")))
def test_float16_is_trained_with_the_same_options(run: Callable[..., Path], family: str) -> None:
    settings = {"lora": True, "dtype": "float16", "micro_batch": 4}
    more = {"checkpointing": "full", "attention": "auto", **PATCHED}
    checks.assert_same_weights(run(family, **settings), run(family, True, **more, **settings))


@pytest.mark.parametrize("family", release_but(("flux",), CASES))
@parts
def test_checkpoint_policies_and_attention_change_no_bit_of_the_recipes_precision(
    run: Callable[..., Path], family: str, lora: bool
) -> None:
    settings = {"lora": lora, "iterations": 1, **RECIPES[lora]}
    plain = run(family, **settings)
    for policy in POLICIES:
        auto = {"memory_gib": 4.0, "attention": "auto"} if policy == "auto" else {}
        checks.assert_same_weights(plain, run(family, checkpointing=policy, **auto, **PATCHED, **settings))


@families
def test_lora_is_what_the_pipeline_loads(run: Callable[..., Path], base: Callable[[str], Path], family: str) -> None:
    output = run(family, lora=True, micro_batch=4)
    trained = checks.weights(output)
    pipeline = load_pipeline(base(family))
    pipeline.load_lora_weights(output / "model", adapter_name="default")
    denoisers = {"": pipeline.unet if family == "stable_diffusion" else pipeline.transformer}
    if family == "wan_a14b":
        second = {"load_into_transformer_2": True, "adapter_name": "default"}
        pipeline.load_lora_weights(output / "model" / "transformer_2", **second)
        denoisers = {"transformer.": pipeline.transformer, "transformer_2.": pipeline.transformer_2}
    loaded = {f"{start}{name}": p for start, one in denoisers.items() for name, p in one.named_parameters()}
    assert trained and all(torch.equal(loaded[name], value) for name, value in trained.items())
    for start, denoiser in denoisers.items():
        moved = [value for name, value in trained.items() if name.startswith(start) and "lora_B" in name]
        assert moved and any(bool(value.any()) for value in moved)
        layers = [module for module in denoiser.modules() if hasattr(module, "lora_A")]
        assert layers and all(layer.scaling["default"] == 3.0 for layer in layers)
