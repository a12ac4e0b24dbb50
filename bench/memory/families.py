"""Small real models of every family that the planner knows, larger in activations than in weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.lora import add_lora
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.patch import accelerate

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 4


@dataclass(frozen=True)
class Family:
    """A configuration of a diffusers class, and the call: sizes in pixels, text tokens, rows."""

    name: str
    denoiser: str
    config: dict[str, Any]
    frames: int
    height: int
    width: int
    text_tokens: int
    rows: int = 2

    @property
    def patched(self) -> bool:
        """Whether `accelerate` knows its blocks."""
        return self.denoiser != "UNet2DConditionModel"

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """As the planner takes them: frames, height, width, rows, text tokens."""
        return self.frames, self.height, self.width, self.rows, self.text_tokens

    def spec(self, folder: Path) -> specs.Spec:
        """What the planner reads from a diffusers folder, which is written into `folder`."""
        target = folder / self.name.replace(" ", "-") / "transformer"
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps({"_class_name": self.denoiser, **self.config}))
        return specs.resolve(target.parent)


_HUNYUAN = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
FAMILIES = (
    Family(
        "SD UNet",
        "UNet2DConditionModel",
        {
            "sample_size": 32,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "layers_per_block": 1,
        },
        *(1, 256, 256, 16),
    ),
    Family(
        "FLUX",
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        *(1, 320, 320, 32),
    ),
    Family("HunyuanVideo", "HunyuanVideoTransformer3DModel", _HUNYUAN, 9, 192, 192, 32),
    Family("SkyReels", "HunyuanVideoTransformer3DModel", _HUNYUAN | {"in_channels": 32}, 9, 192, 192, 32),
    Family(
        "SD3.5",
        "SD3Transformer2DModel",
        {
            "sample_size": 40,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 24,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0, 1),
        },
        *(1, 320, 320, 32),
    ),
    Family(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        *(1, 320, 320, 32),
    ),
    Family(
        "Wan",
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 160,
            "num_layers": 3,
            "cross_attn_norm": True,
            "rope_max_seq_len": 64,
        },
        *(9, 192, 192, 32),
    ),
)


def prepare(model: nn.Module, lora: torch.dtype | None, patch: str, rank: int = RANK) -> nn.Module:
    """LoRA layers of some dtype, or none, and block ops, on `meta` as on a real model; `patch`: "mode, recompute"."""
    if lora is not None:
        with torch.device(next(model.parameters()).device):
            add_lora(model, rank, rank, TARGETS)
        for p in model.parameters():
            p.data = p.data.to(lora) if p.requires_grad else p.data
    if patch != "off":
        mode, recompute = patch.split(", ")
        # Trimming reads the mask, and fake ones have no values.
        accelerate(model, mode, recompute=recompute, trim_text=False)
    return model


def real(spec: specs.Spec, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The model with random weights, as diffusers would load it in `dtype`."""
    import diffusers

    cls: Callable[..., nn.Module] = getattr(diffusers, spec.denoiser)
    torch.manual_seed(0)
    with torch.device(device):
        return specs.cast(cls(**spec.config), dtype, spec.keep_in_float32).train()


def real_inputs(
    spec: specs.Spec, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What the model is called with, drawn; `sizes` as `Family.sizes`."""
    found = specs.inputs(spec, *sizes, device=device, dtype=dtype)
    for value in found.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.normal_()
    return found
