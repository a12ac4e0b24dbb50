"""`--accelerate`: what is loaded through diffusers gets the block ops, or a reason why it does not."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dancegrpo_fast as dgf
from dancegrpo_fast.dropin import loading

from ..models.folders import save_flux, save_stable_diffusion
from ..patch.models import TINY, assert_same_bits, run

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was said; diffusers is as before afterwards."""
    mixin = diffusers.ConfigMixin
    monkeypatch.setattr(mixin, "from_config", mixin.__dict__["from_config"])
    monkeypatch.setattr(loading, "RECORDS", [])
    return []


def has_block_ops(model: nn.Module) -> bool:
    return any("forward" in vars(module) for module in model.modules())


def test_loaded_model_and_what_is_done_with_it(said: list[str], tmp_path: Path) -> None:
    """LoRA, checkpointing and copies after, as scripts do; bits and keys as without."""
    from peft import LoraConfig

    def prepared() -> tuple[Any, Any]:
        model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
        keys = list(model.state_dict())
        torch.manual_seed(2)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False))
        model.enable_gradient_checkpointing()
        return keys, model.to(torch.bfloat16).train()

    TINY["flux"].model().save_pretrained(tmp_path / "transformer")
    plain_keys, plain = prepared()
    loading.install("lossless:cpu", said.append)
    keys, model = prepared()
    assert said == ["FluxTransformer2DModel runs on the block ops (lossless)"]
    assert keys == plain_keys and has_block_ops(model) and not has_block_ops(plain)
    inputs = TINY["flux"].inputs(torch.bfloat16)
    wanted = run(plain, inputs)
    assert_same_bits(run(model, inputs), wanted)

    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
    assert has_block_ops(average) and not run(average, inputs)[0].any()
    assert_same_bits(run(model, inputs), wanted)


def test_saved_whole(said: list[str], tmp_path: Path) -> None:
    """The file opens as diffusers' own model, which can be accelerated again."""
    loading.install("fast:cpu", said.append)
    model = diffusers.FluxTransformer2DModel.from_config(TINY["flux"].model().config).to(torch.bfloat16)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    inputs = TINY["flux"].inputs(torch.bfloat16)
    fast = run(model, inputs)
    plain = run(loaded, inputs)
    assert any(not torch.equal(fast[1][name], grad) for name, grad in plain[1].items())
    undo = dgf.accelerate(loaded, "fast")
    assert_same_bits(run(loaded, inputs), fast)
    undo()
    assert_same_bits(run(loaded, inputs), plain)


def test_compiled_after(said: list[str]) -> None:
    torch._dynamo.reset()
    config = TINY["wan"].model().config
    loading.install("lossless:cpu", said.append)
    torch.manual_seed(0)
    model, inputs = diffusers.WanTransformer3DModel.from_config(config, num_layers=1), TINY["wan"].inputs()
    wanted = model(**inputs)[0]
    compiled = torch.compile(model, backend="eager")
    assert has_block_ops(model) and torch.equal(compiled(**inputs)[0], wanted)
    torch._dynamo.reset()


def test_pipeline(said: list[str], tmp_path: Path) -> None:
    """Its transformer; nothing is said of a VAE."""
    loading.install("fast:cpu", said.append)
    pipeline = diffusers.FluxPipeline.from_pretrained(save_flux(tmp_path))
    assert has_block_ops(pipeline.transformer) and not has_block_ops(pipeline.vae)
    assert said == ["FluxTransformer2DModel runs on the block ops (fast)"]
    record = {"class": "FluxTransformer2DModel", "mode": "fast", "accepted": True, "reason": ""}
    assert [record] == loading.RECORDS


def test_models_that_are_refused(said: list[str], tmp_path: Path) -> None:
    """Another architecture, and a project's class of its own under a known name."""

    class FluxTransformer2DModel(diffusers.FluxTransformer2DModel):  # type: ignore[misc, name-defined]  # untyped
        pass

    loading.install("lossless:cpu", said.append)
    unet = diffusers.StableDiffusionPipeline.from_pretrained(save_stable_diffusion(tmp_path), safety_checker=None).unet
    own = FluxTransformer2DModel.from_config(TINY["flux"].model().config)
    assert not has_block_ops(unet) and not has_block_ops(own)
    assert [record["accepted"] for record in loading.RECORDS] == [False, False]
    assert said[0].startswith("UNet2DConditionModel is left as it is: transformer: got diffusers.models")
    assert said[1].startswith(f"FluxTransformer2DModel is left as it is: transformer: got {__name__}")


@pytest.mark.parametrize("cuda", [True, False])
def test_a_cpu_is_left_alone(said: list[str], monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """Unless the mode says so; each outcome is said once, and recorded for every model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = TINY["sd3"].model().config
    loading.install("lossless", said.append)
    models = [diffusers.SD3Transformer2DModel.from_config(config, num_layers=1) for _ in range(2)]
    assert [has_block_ops(model) for model in models] == [cuda] * 2
    assert len(said) == 1 and len(loading.RECORDS) == 2
    assert cuda or "a step 1.6 to 2.5 times as long (--accelerate lossless:cpu puts them in)" in said[0]


def test_a_module_that_comes_later(said: list[str]) -> None:
    """Whoever imports modules calls what is returned; nothing is imported for it."""
    module = sys.modules.pop("diffusers.configuration_utils")
    try:
        waiting = loading.install("lossless:cpu", said.append)
        assert "diffusers.configuration_utils" not in sys.modules
    finally:
        sys.modules["diffusers.configuration_utils"] = module
    config = TINY["sd3"].model().config
    assert not has_block_ops(diffusers.SD3Transformer2DModel.from_config(config, num_layers=1))
    for name, function in waiting.items():
        function(sys.modules[name])
    model, rest = diffusers.SD3Transformer2DModel.from_config(config, num_layers=1, return_unused_kwargs=True)
    assert has_block_ops(model) and isinstance(rest, dict)


def test_unknown_mode(said: list[str]) -> None:
    with pytest.raises(ValueError, match='--accelerate: got "best", want one of lossless, fast, lossless:cpu'):
        loading.install("best", said.append)
