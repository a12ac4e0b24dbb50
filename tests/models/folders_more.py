"""Tiny SD3, Qwen-Image and Wan folders as their pipelines save them: every part, weights drawn here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .parts import clip_encoder, clip_tokenizer, image_vae, randomised, t5_encoder, t5_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def save_sd3(folder: Path, **scheduler: Any) -> Path:
    """SD3.5's architecture: QK norms, and a second attention in the first block."""
    torch.manual_seed(0)
    vae = image_vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    text = {"num_hidden_layers": 2, "projection_dim": 8}
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    diffusers.StableDiffusion3Pipeline(
        randomised(transformer),
        diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        randomised(vae),
        clip_encoder(8, **text),
        clip_tokenizer(),
        clip_encoder(8, **text),
        clip_tokenizer(),
        t5_encoder("T5", 24),
        t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def save_qwen_image(folder: Path) -> Path:
    """Tokens are bytes, so that the chat template takes two hundred of them."""
    from tokenizers.pre_tokenizers import ByteLevel

    torch.manual_seed(0)
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer({token: i for i, token in enumerate(tokens)}, [])
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "pad_token_id": 256,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=(0.1, -0.2, 0.3, 0.0),
        latents_std=(1.5, 0.8, 1.1, 2.0),
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    diffusers.QwenImagePipeline(
        scheduler,
        randomised(vae),
        randomised(transformers.Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer,
        randomised(transformer),
    ).save_pretrained(folder)
    return folder


def save_wan(folder: Path, scheduler: Any = None, **pipeline: Any) -> Path:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=(0.1, -0.2, 0.3, 0.0),
        latents_std=(1.5, 0.8, 1.1, 2.0),
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=32,
    )
    diffusers.WanPipeline(
        t5_tokenizer(),
        t5_encoder("UMT5", 16),
        randomised(vae),
        scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        randomised(transformer),
        **pipeline,
    ).save_pretrained(folder)
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {"sd3": save_sd3, "qwen_image": save_qwen_image, "wan": save_wan}
