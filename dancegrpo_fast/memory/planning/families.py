"""What a denoiser of each architecture is called with."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .specs import Spec


@dataclass(frozen=True)
class Call:
    """Sizes of one denoiser call; latent frames, height and width in `grid`, and those of a reference image."""

    spec: "Spec"
    batch: int
    grid: tuple[int, int, int]
    text: int
    device: str | torch.device
    dtype: torch.dtype
    reference: tuple[int, int] = (0, 0)

    @property
    def config(self) -> dict[str, Any]:
        """Of the denoiser."""
        return self.spec.config

    def floats(self, *shape: int) -> Tensor:
        """One row a sample, in the model's dtype."""
        return torch.empty(self.batch, *shape, device=self.device, dtype=self.dtype)

    def times(self) -> Tensor:
        """One float32 number a sample, as the trainer keeps times."""
        return torch.empty(self.batch, device=self.device)

    def volume(self) -> Tensor:
        """Latents `[B, C, T, H, W]`, with the channels that the denoiser takes."""
        return self.floats(self.config["in_channels"], *self.grid)

    def embeds(self, key: str, tokens: int | None = None) -> Tensor:
        """Text embeddings as wide as the configuration's `key` says."""
        return self.floats(self.text if tokens is None else tokens, self.config[key])

    def mask(self, tokens: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
        """Of text tokens, none of them padding."""
        return torch.ones(self.batch, self.text if tokens is None else tokens, dtype=dtype, device=self.device)

    def packed(self) -> int:
        """Tokens of two by two latents, and those of the reference image."""
        return (self.grid[1] * self.grid[2] + self.reference[0] * self.reference[1]) // 4

    def ids(self, tokens: int, axes: int) -> Tensor:
        """Positions of tokens."""
        return torch.empty(tokens, axes, device=self.device, dtype=self.dtype)


# SDXL's sizes: of the picture, of its crop, and of the target.
_TIME_IDS = 6


def _unet(call: Call) -> dict[str, Any]:
    config = call.config
    kind = config.get("addition_embed_type")
    if kind not in (None, "text_time") or config.get("class_embed_type"):
        raise ValueError(f"model: got a UNet with embeddings beside the text in {call.spec.name}, want SD's or SDXL's")
    added = {}
    if kind == "text_time":
        width = config["projection_class_embeddings_input_dim"] - _TIME_IDS * config["addition_time_embed_dim"]
        added = {"added_cond_kwargs": {"text_embeds": call.floats(width), "time_ids": call.floats(_TIME_IDS)}}
    return {
        "sample": call.volume().squeeze(2),
        "timestep": call.times(),
        "encoder_hidden_states": call.embeds("cross_attention_dim"),
    } | added


def _guidance(call: Call) -> dict[str, Any]:
    return {"guidance": call.times()} if call.config.get("guidance_embeds") else {}


def _positioned(call: Call, axes: int) -> dict[str, Any]:
    tokens = call.packed()
    return {
        "hidden_states": call.floats(tokens, call.config["in_channels"]),
        "encoder_hidden_states": call.embeds("joint_attention_dim"),
        "timestep": call.times(),
        "img_ids": call.ids(tokens, axes),
        "txt_ids": call.ids(call.text, axes),
    }


def _flux(call: Call) -> dict[str, Any]:
    pooled = {"pooled_projections": call.floats(call.config["pooled_projection_dim"])}
    return _positioned(call, 3) | pooled | _guidance(call)


def _flux2(call: Call) -> dict[str, Any]:
    return _positioned(call, 4) | _guidance(call)


def _chroma(call: Call) -> dict[str, Any]:
    mask = call.mask(call.text + call.packed(), call.dtype)
    return _positioned(call, 3) | {"attention_mask": mask}


def _z_image(call: Call) -> dict[str, Any]:
    return {
        "x": list(call.volume().unbind()),
        "t": call.times(),
        "cap_feats": list(call.embeds("cap_feat_dim").unbind()),
    }


def _hunyuan(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.volume(),
        "timestep": call.times(),
        "encoder_hidden_states": call.embeds("text_embed_dim"),
        "encoder_attention_mask": call.mask(),
        "pooled_projections": call.floats(call.config["pooled_projection_dim"]),
    } | _guidance(call)


# ByT5's tokens of glyphs, and SigLIP's of the first frame, which text to video has as zeros.
_GLYPHS, _FRAME = 256, 729


def _hunyuan15(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.volume(),
        "timestep": call.times(),
        "encoder_hidden_states": call.embeds("text_embed_dim"),
        "encoder_attention_mask": call.mask(),
        "encoder_hidden_states_2": call.embeds("text_embed_2_dim", _GLYPHS),
        "encoder_attention_mask_2": call.mask(_GLYPHS),
        "image_embeds": call.embeds("image_embed_dim", _FRAME),
    }


def _sd3(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.volume().squeeze(2),
        "encoder_hidden_states": call.embeds("joint_attention_dim"),
        "pooled_projections": call.floats(call.config["pooled_projection_dim"]),
        "timestep": call.times(),
    }


def _qwen(call: Call) -> dict[str, Any]:
    shapes = [(1, rows // 2, columns // 2) for rows, columns in (call.grid[1:], call.reference) if rows]
    # Prompts of one length have no mask in the pipeline; padded ones do.
    mask = None if call.batch == 1 else call.mask(dtype=torch.bool)
    return {
        "hidden_states": call.floats(call.packed(), call.config["in_channels"]),
        "encoder_hidden_states": call.embeds("joint_attention_dim"),
        "encoder_hidden_states_mask": mask,
        "timestep": call.times(),
        "img_shapes": [shapes] * call.batch,
    } | _guidance(call)


def _wan(call: Call) -> dict[str, Any]:
    image = call.config.get("image_dim")
    # CLIP ViT-H/14 gives 257 tokens of the first frame.
    extra = {"encoder_hidden_states_image": call.floats(257, image)} if image else {}
    times = call.times()
    if call.spec.times_per_token:
        times = times[:, None].expand(-1, prod(call.grid) // prod(call.spec.patch))
    return {
        "hidden_states": call.volume(),
        "timestep": times,
        "encoder_hidden_states": call.embeds("text_dim"),
    } | extra


def _flat_video(call: Call) -> dict[str, Any]:
    frames, height, width = call.grid
    return {
        "hidden_states": call.floats(prod(call.grid), call.config["in_channels"]),
        "encoder_hidden_states": call.embeds("caption_channels"),
        "timestep": call.times(),
        "encoder_attention_mask": call.mask(),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


# LTX-2's pipeline: frames a second of the video, and latents a second of its sound.
_FPS, _SOUND = 24.0, 25


def _ltx2(call: Call) -> dict[str, Any]:
    frames = (call.grid[0] - 1) * call.spec.compression[0] + 1
    sound = round(frames / _FPS * _SOUND)
    return _flat_video(call) | {
        "audio_hidden_states": call.floats(sound, call.config["audio_in_channels"]),
        "audio_encoder_hidden_states": call.embeds("caption_channels"),
        "audio_encoder_attention_mask": call.mask(),
        "fps": _FPS,
        "audio_num_frames": sound,
    }


def _cogvideox(call: Call) -> dict[str, Any]:
    config = call.config
    rotary: dict[str, Any] = {}
    if config["use_rotary_positional_embeddings"]:
        table = torch.empty(prod(call.grid) // prod(call.spec.patch), config["attention_head_dim"], device=call.device)
        rotary = {"image_rotary_emb": (table, torch.empty_like(table))}
    return {
        # Frames come before channels.
        "hidden_states": call.volume().transpose(1, 2).contiguous(),
        "encoder_hidden_states": call.embeds("text_embed_dim"),
        "timestep": call.times(),
    } | rotary


@dataclass(frozen=True)
class Family:
    """What all models of one architecture share.

    Attributes:
        inputs: of a call.
        text_tokens: of a prompt, as the pipeline pads it or at most.
        compression: of the published VAE, where a folder has none.
        packed: latents are packed two by two.
        joint: the longest attention has the text's tokens beside the latents'.
        reference: a picture to edit is given as more tokens.
        sorts_text: its forward picks tokens by their mask, and all count as valid (`guessed.count_masked`).
    """

    inputs: Callable[[Call], dict[str, Any]]
    text_tokens: int
    compression: tuple[int, int, int]
    packed: bool = False
    joint: bool = True
    reference: bool = False
    sorts_text: bool = False


FAMILIES = {
    "UNet2DConditionModel": Family(_unet, 77, (1, 8, 8), joint=False),
    "FluxTransformer2DModel": Family(_flux, 512, (1, 8, 8), packed=True, reference=True),
    "Flux2Transformer2DModel": Family(_flux2, 512, (1, 8, 8), packed=True, reference=True),
    "ChromaTransformer2DModel": Family(_chroma, 512, (1, 8, 8), packed=True),
    "HunyuanVideoTransformer3DModel": Family(_hunyuan, 256, (4, 8, 8)),
    "HunyuanVideo15Transformer3DModel": Family(_hunyuan15, 1000, (4, 16, 16), sorts_text=True),
    "SD3Transformer2DModel": Family(_sd3, 333, (1, 8, 8)),
    "QwenImageTransformer2DModel": Family(_qwen, 512, (1, 8, 8), packed=True, reference=True),
    "WanTransformer3DModel": Family(_wan, 512, (4, 8, 8), joint=False),
    "ZImageTransformer2DModel": Family(_z_image, 512, (1, 8, 8)),
    "LTXVideoTransformer3DModel": Family(_flat_video, 128, (8, 32, 32), joint=False),
    "LTX2VideoTransformer3DModel": Family(_ltx2, 1024, (8, 32, 32), joint=False),
    "CogVideoXTransformer3DModel": Family(_cogvideox, 226, (4, 8, 8)),
}
