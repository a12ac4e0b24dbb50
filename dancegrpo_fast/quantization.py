"""Frozen weights in fewer bits, under LoRA and of text encoders, by bitsandbytes and diffusers' layerwise casting."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

BITSANDBYTES = ("nf4", "int8")
# Of a text encoder's two-dimensional weights: no linear layers, or left as they are by transformers, whose T5 casts
# what goes into `wo` to the dtype of its weight.
_WIDE = r"DenseReluDense\.wo"
_AS_THEY_ARE = re.compile(rf"embed|shared|relative_attention_bias|lm_head|wte|wpe|text_projection|{_WIDE}")


def loading(kind: str | None, device: torch.device) -> dict[str, Any]:
    """`from_pretrained`'s arguments for a denoiser whose linear layers are quantised while they are loaded.

    Args:
        kind: `model.quantization`.
        device: that the denoiser is loaded onto; a quantised one cannot wait on the host for it.

    Returns:
        Nothing but for "nf4" and "int8", which are bitsandbytes'.
    """
    if kind not in BITSANDBYTES:
        return {}
    from diffusers import BitsAndBytesConfig

    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    else:
        # Outliers are looked for in a whole call, so that a sample's result would depend on its neighbours.
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return {"quantization_config": config, "device_map": {"": str(device)}}


def store_in_fp8(denoiser: Any, compute: torch.dtype) -> None:
    """Frozen weights of linear layers and convolutions as float8 (e4m3), cast to `compute` while their layer runs.

    Autograd keeps the cast copy of a layer for its backward: memory is saved where blocks are checkpointed.
    """
    from diffusers.hooks import HookRegistry

    skipped = (*(denoiser._skip_layerwise_casting_patterns or ()), "norm", "pos_embed", "lora_")
    denoiser.enable_layerwise_casting(torch.float8_e4m3fn, compute, skip_modules_pattern=skipped)
    # It has peft hand a layer's input to LoRA as it is, as if LoRA were in float8, too.
    HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook("peft_autocast_disable")


def stored_in_fewer(name: str) -> bool:
    """Whether a text encoder's two-dimensional weight of this name, or its layer's, is quantised."""
    return _AS_THEY_ARE.search(name) is None


def wide_in_float16(name: str) -> bool:
    """Whether transformers loads a text encoder's weight of this name in float32 where the others are float16."""
    return re.search(_WIDE, name) is not None


def linear_layers(encoder: nn.Module) -> Iterator[nn.Linear]:
    """Of a text encoder, those that are quantised."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and stored_in_fewer(name):
            yield module


def loading_encoders(kind: str, names: Iterable[str], compute: torch.dtype) -> dict[str, Any]:
    """`from_pretrained`'s arguments for a pipeline whose text encoders are quantised while they are loaded.

    Args:
        kind: `model.text_encoder_quantization`, "nf4" or "int8", which are bitsandbytes'.
        names: of the encoders in the pipeline.
        compute: dtype of their calls.
    """
    from diffusers import PipelineQuantizationConfig
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    else:
        # Prompts are encoded one by one: outliers are those of one prompt.
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=dict.fromkeys(names, config))}


def store_encoder_in_fp8(encoder: nn.Module, compute: torch.dtype) -> None:
    """`linear_layers` of a text encoder as float8 (e4m3), cast to `compute` while they run."""
    from diffusers.hooks import apply_layerwise_casting_hook

    for layer in linear_layers(encoder):
        apply_layerwise_casting_hook(layer, torch.float8_e4m3fn, compute, non_blocking=False)
