"""Tiny FLUX, Stable Diffusion, HunyuanVideo and SkyReels folders as their pipelines save them; `BUILDERS`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from . import folders_more
from .folders_more import LETTERS, clip_tokenizer, randomised, t5_encoder, t5_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH = 8


def _clip_encoder(positions: int) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
    )
    return randomised(transformers.CLIPTextModel(config))


def _image_vae(**settings: Any) -> nn.Module:
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **settings,
    )
    return randomised(vae)


def save_flux(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        **{"guidance_embeds": True} | changes,
    )
    diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        ),
        _image_vae(scaling_factor=0.8, shift_factor=0.1),
        _clip_encoder(8),
        clip_tokenizer(8),
        t5_encoder("T5", WIDTH),
        t5_tokenizer(),
        randomised(transformer),
    ).save_pretrained(folder)
    return folder


def save_stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    diffusers.StableDiffusionPipeline(
        _image_vae(scaling_factor=0.8),
        _clip_encoder(8),
        clip_tokenizer(8),
        randomised(unet),
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _word_tokenizer() -> Any:
    """A word or a run of punctuation is a token: the prompt's template takes 99 of them, 95 of which are cropped."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(DEFAULT_PROMPT_TEMPLATE["template"])}
    words |= {"<|", *LETTERS}
    tokens = ["<pad>", "<unk>", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )


def _hunyuan(folder: Path, pipeline: Any, **changes: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = _word_tokenizer()
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
        **changes,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipeline(
        randomised(transformers.LlamaModel(llama)),
        tokenizer,
        randomised(transformer),
        randomised(vae),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        _clip_encoder(77),
        clip_tokenizer(77),
    ).save_pretrained(folder)
    return folder


def save_hunyuan_video(folder: Path, **changes: Any) -> Path:
    return _hunyuan(folder, diffusers.HunyuanVideoPipeline, **{"in_channels": 4, "guidance_embeds": True} | changes)


def save_skyreels(folder: Path, **changes: Any) -> Path:
    pipeline = diffusers.HunyuanSkyreelsImageToVideoPipeline
    return _hunyuan(folder, pipeline, **{"in_channels": 8, "guidance_embeds": True} | changes)


BUILDERS: dict[str, Callable[..., Path]] = {
    "flux": save_flux,
    "stable_diffusion": save_stable_diffusion,
    "hunyuan_video": save_hunyuan_video,
    "skyreels_i2v": save_skyreels,
    **folders_more.BUILDERS,
}
