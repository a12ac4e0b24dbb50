"""Folders of tiny pipelines, as diffusers lays them out."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dancegrpo_fast.memory.planning import folders
from dancegrpo_fast.memory.planning.settings import Settings

WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
VAE = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
T5 = {"model_type": "umt5", "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 40}
# Of one text encoder: 10 tokens' embeddings, a linear layer, and a norm.
TENSORS = {"shared.weight": (10, 16), "encoder.block.0.q.weight": (16, 16), "encoder.norm.weight": (16,)}


def write(folder: Path, index: dict[str, Any] | None, **parts: dict[str, Any]) -> Path:
    for name, config in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    if index is not None:
        (folder / folders.INDEX).write_text(json.dumps(index))
    return folder


def save(file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> None:
    save_file({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, file)


def wan22(folder: Path) -> Path:
    """As Wan 2.2 A14B's folder is laid out."""
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.875,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "image_encoder": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    vae = VAE | {"temperal_downsample": [False, True, True]}
    folder = write(folder, index, transformer=WAN, transformer_2=WAN, vae=vae, text_encoder=T5)
    save(folder / "text_encoder" / "model.safetensors", TENSORS)
    return folder


def asked(folder: Path, **more: Any) -> Settings:
    """A small call of it, LoRA unless said otherwise."""
    given: dict[str, Any] = {"lora": 2, "text_tokens": 8, "checkpointing": "full"}
    return Settings(str(folder), 5, 64, 64, **(given | more))
