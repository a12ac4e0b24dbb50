"""Tiny folders of every family as their pipelines save them, with weights drawn here; `BUILDERS`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.models.qwen_image_edit import picture_processor

from . import parts

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH = 8
# Of the VAEs of Qwen-Image and Wan.
CAUSAL: dict[str, Any] = {
    "z_dim": 4,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "latents_mean": (0.1, -0.2, 0.3, 0.0),
    "latents_std": (1.5, 0.8, 1.1, 2.0),
}


def save_flux(folder: Path, pipeline: str = "FluxPipeline", **changes: Any) -> Path:
    torch.manual_seed(0)
    transformer = parts.flux_transformer(WIDTH, **{"guidance_embeds": True} | changes)
    getattr(diffusers, pipeline)(
        diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        ),
        parts.randomised(parts.image_vae(scaling_factor=0.8, shift_factor=0.1)),
        parts.clip_encoder(WIDTH, 8),
        parts.clip_tokenizer(8),
        parts.t5_encoder("T5", WIDTH),
        parts.t5_tokenizer(),
        parts.randomised(transformer),
    ).save_pretrained(folder)
    return folder


def save_flux_kontext(folder: Path) -> Path:
    return save_flux(folder, "FluxKontextPipeline")


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
        parts.randomised(parts.image_vae(scaling_factor=0.8)),
        parts.clip_encoder(WIDTH, 8),
        parts.clip_tokenizer(8),
        parts.randomised(parts.unet(WIDTH)),
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
    words |= {"<|", *parts.LETTERS}
    tokens = ["<pad>", "<unk>", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )


def _hunyuan(folder: Path, pipeline: Any, **changes: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = _word_tokenizer()
    llama = transformers.LlamaConfig(**parts.language_model(len(tokenizer), WIDTH, 3, 0))
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
        parts.randomised(transformers.LlamaModel(llama)),
        tokenizer,
        parts.randomised(transformer),
        parts.randomised(vae),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        parts.clip_encoder(WIDTH, 77),
        parts.clip_tokenizer(77),
    ).save_pretrained(folder)
    return folder


def save_hunyuan_video(folder: Path, **changes: Any) -> Path:
    return _hunyuan(folder, diffusers.HunyuanVideoPipeline, **{"in_channels": 4, "guidance_embeds": True} | changes)


def save_skyreels(folder: Path, **changes: Any) -> Path:
    pipeline = diffusers.HunyuanSkyreelsImageToVideoPipeline
    return _hunyuan(folder, pipeline, **{"in_channels": 8, "guidance_embeds": True} | changes)


def save_sd3(folder: Path, **scheduler: Any) -> Path:
    """SD3.5's architecture: QK norms, and a second attention in the first block."""
    torch.manual_seed(0)
    vae = parts.image_vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
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
        parts.randomised(transformer),
        diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        parts.randomised(vae),
        parts.clip_encoder(8, **text),
        parts.clip_tokenizer(),
        parts.clip_encoder(8, **text),
        parts.clip_tokenizer(),
        parts.t5_encoder("T5", 24),
        parts.t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def _qwen_image(folder: Path, pipeline: Any, added: tuple[str, ...] = (), **transformer: Any) -> Any:
    """Tokens are bytes, and those added. Gives back the tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    torch.manual_seed(0)
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer({token: i for i, token in enumerate(tokens)}, [])
    tokenizer.add_tokens(list(added), special_tokens=True)
    numbers = {"image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_PAD)} if added else {}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = parts.language_model(len(tokenizer), 16, 1, 256) | {"rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **numbers)
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, temperal_downsample=[False], **CAUSAL)
    denoiser = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        **transformer,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    pipeline(
        scheduler=scheduler,
        vae=parts.randomised(vae),
        text_encoder=parts.randomised(transformers.Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=tokenizer,
        transformer=parts.randomised(denoiser),
    ).save_pretrained(folder)
    return tokenizer


def save_qwen_image(folder: Path) -> Path:
    """The chat template takes two hundred tokens."""
    _qwen_image(folder, diffusers.QwenImagePipeline)
    return folder


IMAGE_PAD = "<|image_pad|>"


def save_qwen_image_edit(folder: Path, pipeline: str = "QwenImageEditPlusPipeline", **transformer: Any) -> Path:
    """As the published tokenizer, that of this folder makes 64 tokens of what precedes the user's words."""
    cls = getattr(diffusers, pipeline)
    template = cls(*[None] * 6).prompt_template_encode
    words = template.removeprefix("<|im_start|>system\n").partition("<|im_end|>")[0]
    # Beside the words there are 16 tokens, and one more stands for most of the words.
    added = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", IMAGE_PAD, "<|vision_end|>", words[: 17 - 64])
    tokenizer = _qwen_image(folder, partial(cls, processor=None), added, **transformer)
    transformers.Qwen2VLImageProcessor().save_pretrained(folder / "processor")
    tokenizer.save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_wan(folder: Path, scheduler: Any = None, **pipeline: Any) -> Path:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, temperal_downsample=[True], scale_factor_temporal=2, scale_factor_spatial=2, **CAUSAL
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
        parts.t5_tokenizer(),
        parts.t5_encoder("UMT5", 16),
        parts.randomised(vae),
        scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        parts.randomised(transformer),
        **pipeline,
    ).save_pretrained(folder)
    return folder


def load_pipeline(folder: Path, name: str = "DiffusionPipeline") -> Any:
    """The whole pipeline of a folder; where that sees pictures, without its processor of videos, as in training."""
    processor = folder / "processor"
    parts = {"processor": picture_processor(processor)} if processor.is_dir() else {}
    pipeline = getattr(diffusers, name).from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


BUILDERS: dict[str, Callable[..., Path]] = {
    "flux": save_flux,
    "flux_kontext": save_flux_kontext,
    "stable_diffusion": save_stable_diffusion,
    "hunyuan_video": save_hunyuan_video,
    "skyreels_i2v": save_skyreels,
    "sd3": save_sd3,
    "qwen_image": save_qwen_image,
    "qwen_image_edit": save_qwen_image_edit,
    "wan": save_wan,
}
