"""Frozen weights of LoRA in fewer bits, by diffusers' own quantisers and layerwise casting."""

from typing import Any

import torch

BITSANDBYTES = ("nf4", "int8")


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
