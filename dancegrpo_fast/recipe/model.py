"""`model:` of a recipe."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..checks import shown
from .checks import at_least, check_fields, positive

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoraSettings:
    """peft LoRA on the denoiser.

    Args:
        rank: of the update matrices.
        alpha: its scale is `alpha / rank`.
        target_modules: endings of the module names that get one.
    """

    rank: int = 32
    alpha: int = 32
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self) -> None:
        check_fields("model.lora", self)
        positive("model.lora.rank", self.rank)
        positive("model.lora.alpha", self.alpha)


@dataclass
class ModelSettings:
    """The generator.

    Args:
        family: "flux", "flux_kontext", "stable_diffusion", "hunyuan_video", "skyreels_i2v", "sd3", "qwen_image",
            "qwen_image_edit" or "wan".
        path: a diffusers folder, or a name on the hub.
        dtype: of the denoiser's weights. "float16", in families that are trained in it, scales the loss.
        denoiser: where the denoiser is instead, a folder or a name on the hub: in its `transformer/` or `unet/`, or
            directly in it; null: in `path`.
        start_from: weights to start from, on this machine: a LoRA file or its folder (names as diffusers, peft or kohya
            write them; those of text encoders are passed over), a run's folder or a checkpoint of it, or a whole
            denoiser as `denoiser` has it. What KL measures from is the model as it starts. null: the base.
        start_as: what LoRA layers to start from become: the "adapter" that is trained, of the rank, alpha and modules
            that `lora` says, or "merged": added to the base's weights in their precision, so that anything may be
            trained on top.
        frozen_dtype: of the VAE's and the text encoders' weights; null: as `dtype`.
        lora: train LoRA layers instead of the whole denoiser.
        checkpointing: what the backward recomputes: "none", "full", "attention", "matmul", "first:K" (the first K
            blocks), or "auto": as little as `memory_gib` allows.
        memory_gib: what "auto" may use; null: the device's memory.
        block_ops: put the block ops into the denoiser, "lossless" or "fast" (`dancegrpo_fast.accelerate`).
        on_mismatch: "warn", or "eager" to compute by eager torch what "lossless" block ops compute otherwise on this
            GPU.
        attention: a diffusers attention backend by name, or "auto" (`dancegrpo_fast.attention.choice.choose`); null
            leaves the model as it is.
        vae_tiling: decode in tiles, and samples one by one: "on", "off", or "auto", where a whole decode would not fit
            `memory_gib`, in the largest tiles that do.
        vae_tile: side of a tile in pixels; null: "on" takes the VAE's own, or half of a picture that is no larger.
        prompt_cache: folder of prompt embeddings, made once per model and prompt; text encoders are freed afterwards.
        max_text_tokens: of a prompt, where the family has a choice; null: its pipeline's own.
        quantization: how frozen bfloat16 weights under LoRA are stored: "nf4" or "int8" (bitsandbytes', on a GPU; a
            row's result depends on no other row), "fp8" (cast while their layer runs, and kept so for its backward in
            blocks that are not checkpointed); null: as they are.
        second_expert: of a model of two denoisers (Wan 2.2 A14B), of which the second takes the steps with less noise:
            "trained" as the first is, or "frozen", so that steps of the first alone are trained on; null: "trained"
            where there are two.
        text_encoder_quantization: how linear layers of the text encoders are stored while they encode: "nf4" or "int8"
            (bitsandbytes'), "fp8" (cast while their layer runs); null: in `frozen_dtype`, as the rest of them.
        compile: what torch.compile makes graphs of, the same for rollout and replay: "blocks", one by one, or "whole"
            denoisers; null: nothing.
        blocks_to_swap: under LoRA, the frozen weights of so many blocks and two more wait in host memory and stream
            through two buffers on the device, each as large as the largest of them; "auto": as few as `memory_gib`
            needs, or more where an iteration is counted to be shorter.
        reference_height, reference_width: in pixels, to which the picture of a prompt is resized in families that edit
            it ("flux_kontext", "qwen_image_edit"), whatever its own shape is; null: those of the samples.
    """

    family: str
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    denoiser: str | None = None
    start_from: str | None = None
    start_as: Literal["adapter", "merged"] = "adapter"
    frozen_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    lora: LoraSettings | None = None
    checkpointing: str = "none"
    memory_gib: float | None = None
    block_ops: Literal["off", "lossless", "fast"] = "off"
    on_mismatch: Literal["warn", "eager"] = "warn"
    attention: str | None = None
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    vae_tile: int | None = None
    prompt_cache: str = "runs/prompt_cache"
    max_text_tokens: int | None = None
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    second_expert: Literal["trained", "frozen"] | None = None
    text_encoder_quantization: Literal["nf4", "int8", "fp8"] | None = None
    compile: Literal["blocks", "whole"] | None = None
    blocks_to_swap: int | Literal["auto"] = 0
    reference_height: int | None = None
    reference_width: int | None = None

    def __post_init__(self) -> None:
        check_fields("model", self, ["path", "denoiser", "start_from", "prompt_cache"])
        known = ("none", "full", "attention", "matmul", "auto")
        first, _, count = self.checkpointing.partition(":")
        if self.checkpointing not in known and not (first == "first" and count.isdigit() and int(count) > 0):
            raise ValueError(f'model.checkpointing: got "{self.checkpointing}", want one of {known} or "first:K"')
        for name in ("memory_gib", "max_text_tokens", "vae_tile", "reference_height", "reference_width"):
            value = getattr(self, name)
            if value is not None:
                positive(f"model.{name}", value)
        if self.vae_tile is not None and self.vae_tiling == "off":
            raise ValueError(f'model.vae_tile: got {self.vae_tile} with vae_tiling "off", want "on" or "auto"')
        if (self.reference_height is None) != (self.reference_width is None):
            raise ValueError(
                f"model.reference_height: got {shown(self.reference_height)} with reference_width "
                f"{shown(self.reference_width)}, want both, or null"
            )
        if self.start_as == "merged":
            if self.start_from is None:
                raise ValueError('model.start_as: got "merged" without model.start_from, want both')
            if self.quantization in ("nf4", "int8"):
                raise ValueError(f'model.start_as: got "merged" into {self.quantization} weights, want "adapter"')
        if self.on_mismatch == "eager" and self.block_ops != "lossless":
            raise ValueError(f'model.on_mismatch: got "eager" with block_ops "{self.block_ops}", want "lossless"')
        if self.quantization is not None and self.lora is None:
            raise ValueError(f'model.quantization: got "{self.quantization}" without model.lora, want both, or null')
        if self.quantization is not None and self.dtype != "bfloat16":
            raise ValueError(f'model.quantization: got "{self.quantization}" with {self.dtype}, want bfloat16, or null')
        if self.blocks_to_swap != 0:
            if self.blocks_to_swap != "auto":
                at_least("model.blocks_to_swap", self.blocks_to_swap, 0)
            if self.lora is None:
                raise ValueError(
                    f"model.blocks_to_swap: got {shown(self.blocks_to_swap)} without model.lora, want both, or 0: only "
                    "weights that stay as they are can be copied from the host at every call"
                )

    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return _DTYPES[self.dtype]

    def frozen_torch_dtype(self) -> torch.dtype:
        """`frozen_dtype` as torch names it."""
        return _DTYPES[self.frozen_dtype or self.dtype]
