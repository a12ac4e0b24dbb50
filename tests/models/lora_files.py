"""LoRA files as other programs write them, of layers drawn here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
WRITERS = ("diffusers", "diffusers without alpha", "unprefixed", "peft", "peft with rslora")
Layers = dict[str, tuple[Tensor, Tensor, float]]


def denoiser_of(base: Path) -> tuple[Any, str]:
    """The denoiser of a pipeline's folder, and its part's name."""
    part = "unet" if (base / "unet").is_dir() else "transformer"
    name = json.loads((base / part / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(base / part), part


def layers(denoiser: Any) -> Layers:
    """`lora_A`, `lora_B` and the scale of every module that has them."""
    found = {}
    for name, module in denoiser.named_modules():
        if hasattr(module, "lora_A"):
            pair = [part["default"].weight.detach() for part in (module.lora_A, module.lora_B)]
            found[name] = pair[0], pair[1], module.scaling["default"]
    return found


def assert_same(found: Layers, wanted: Layers) -> None:
    assert found.keys() == wanted.keys() and wanted
    for name, (down, up, scale) in wanted.items():
        assert torch.equal(found[name][0], down) and torch.equal(found[name][1], up) and found[name][2] == scale


def write(writer: str, base: Path, folder: Path, rank: int = 2, alpha: int = 6) -> Layers:
    """Writes into `folder`; gives what was written."""
    denoiser, part = denoiser_of(base)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, use_rslora=writer == "peft with rslora")
    adapted = peft.get_peft_model(denoiser, config) if writer.startswith("peft") else denoiser
    if adapted is denoiser:
        denoiser.add_adapter(config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    if writer.startswith("peft"):
        adapted.save_pretrained(folder)
    elif writer == "unprefixed":
        denoiser.save_lora_adapter(folder)
    else:
        from diffusers.training_utils import _collate_lora_metadata

        found = {f"{part}_lora_layers": peft.get_peft_model_state_dict(denoiser)}
        more = _collate_lora_metadata({part: denoiser}) if writer == "diffusers" else {}
        pipeline = diffusers.StableDiffusionPipeline if part == "unet" else diffusers.FluxPipeline
        pipeline.save_lora_weights(folder, **found, **more)
    return layers(denoiser)


def write_kohya(base: Path, file: Path, rank: int = 2, alpha: float = 1.0) -> Layers:
    """Stable Diffusion's names of sd-scripts, in float16, with alphas and a layer of the text encoder."""
    from safetensors.torch import save_file

    found = write("diffusers", base, file.parent / "unused", rank)
    tensors = {"lora_te_text_model_encoder_layers_0_mlp_fc1": (torch.ones(rank, 8), torch.ones(16, rank))}
    tensors |= {f"lora_unet_{name.replace('.', '_')}": (down, up) for name, (down, up, _) in found.items()}
    named = {}
    for name, (down, up) in tensors.items():
        named |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
        named[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(named, file)
    return {name: (down.half().float(), up.half().float(), alpha / rank) for name, (down, up, _) in found.items()}
