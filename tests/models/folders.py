"""Tiny FLUX, Stable Diffusion, HunyuanVideo and SkyReels folders as their pipelines save them; `BUILDERS`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import folders_more
from .parts import (
    LETTERS,
    clip_encoder,
    clip_tokenizer,
    flux_transformer,
    image_vae,
    randomised,
    t5_encoder,
    t5_tokenizer,
    unet,
)

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH = 8


def save_flux(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    transformer = flux_transformer(WIDTH, **{"guidance_embeds": True} | changes)
    diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        ),
        randomised(image_vae(scaling_factor=0.8, shift_factor=0.1)),
        clip_encoder(WIDTH, 8),
        clip_tokenizer(8),
        t5_encoder("T5", WIDTH),
        t5_tokenizer(),
        randomised(transformer),
    ).save_pretrained(folder)
    return folder


def save_stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    torch.manual_seed(0)
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
        randomised(image_vae(scaling_factor=0.8)),
        clip_encoder(WIDTH, 8),
        clip_tokenizer(8),
        randomised(unet(WIDTH)),
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
        clip_encoder(WIDTH, 77),
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
