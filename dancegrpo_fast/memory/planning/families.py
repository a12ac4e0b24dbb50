"""What a denoiser of each architecture is called with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .specs import Spec


@dataclass(frozen=True)
class Call:
    """Sizes of one denoiser call; latent frames, height and width in `grid`."""

    spec: "Spec"
    batch: int
    grid: tuple[int, int, int]
    text: int
    device: str | torch.device
    dtype: torch.dtype

    def floats(self, *shape: int) -> Tensor:
        """One row a sample, in the model's dtype."""
        return torch.empty(self.batch, *shape, device=self.device, dtype=self.dtype)

    def times(self) -> Tensor:
        """One float32 number a sample, as the trainer keeps times."""
        return torch.empty(self.batch, device=self.device)

    def volume(self) -> Tensor:
        """Latents `[B, C, T, H, W]`, with the channels that the denoiser takes."""
        return self.floats(self.spec.config["in_channels"], *self.grid)

    def embeds(self, key: str) -> Tensor:
        """Text embeddings as wide as the configuration's `key` says."""
        return self.floats(self.text, self.spec.config[key])


def _unet(call: Call) -> dict[str, Any]:
    config = call.spec.config
    if config.get("addition_embed_type") or config.get("class_embed_type"):
        raise ValueError(f"model: got a UNet with embeddings beside the text in {call.spec.name}, want one without")
    return {
        "sample": call.volume().squeeze(2),
        "timestep": call.times(),
        "encoder_hidden_states": call.embeds("cross_attention_dim"),
    }


def _guidance(call: Call) -> dict[str, Any]:
    return {"guidance": call.times()} if call.spec.config.get("guidance_embeds") else {}


def _flux(call: Call) -> dict[str, Any]:
    tokens = call.grid[1] * call.grid[2] // 4
    return {
        "hidden_states": call.floats(tokens, call.spec.config["in_channels"]),
        "encoder_hidden_states": call.embeds("joint_attention_dim"),
        "pooled_projections": call.floats(call.spec.config["pooled_projection_dim"]),
        "timestep": call.times(),
        "img_ids": torch.empty(tokens, 3, device=call.device, dtype=call.dtype),
        "txt_ids": torch.empty(call.text, 3, device=call.device, dtype=call.dtype),
    } | _guidance(call)


def _hunyuan(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.volume(),
        "timestep": call.times(),
        "encoder_hidden_states": call.embeds("text_embed_dim"),
        "encoder_attention_mask": torch.ones(call.batch, call.text, dtype=torch.int64, device=call.device),
        "pooled_projections": call.floats(call.spec.config["pooled_projection_dim"]),
    } | _guidance(call)


def _sd3(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.volume().squeeze(2),
        "encoder_hidden_states": call.embeds("joint_attention_dim"),
        "pooled_projections": call.floats(call.spec.config["pooled_projection_dim"]),
        "timestep": call.times(),
    }


def _qwen(call: Call) -> dict[str, Any]:
    rows, columns = (n // 2 for n in call.grid[1:])
    # Prompts of one length have no mask in the pipeline; padded ones do.
    mask = None if call.batch == 1 else torch.ones(call.batch, call.text, dtype=torch.bool, device=call.device)
    return {
        "hidden_states": call.floats(rows * columns, call.spec.config["in_channels"]),
        "encoder_hidden_states": call.embeds("joint_attention_dim"),
        "encoder_hidden_states_mask": mask,
        "timestep": call.times(),
        "img_shapes": [[(1, rows, columns)]] * call.batch,
    } | _guidance(call)


def _wan(call: Call) -> dict[str, Any]:
    image = call.spec.config.get("image_dim")
    # CLIP ViT-H/14 gives 257 tokens of the first frame.
    extra = {"encoder_hidden_states_image": call.floats(257, image)} if image else {}
    return {
        "hidden_states": call.volume(),
        "timestep": call.times(),
        "encoder_hidden_states": call.embeds("text_dim"),
    } | extra


@dataclass(frozen=True)
class Family:
    """What all models of one architecture share."""

    inputs: Callable[[Call], dict[str, Any]]
    text_tokens: int
    # Of the published VAE, where a folder has none.
    compression: tuple[int, int, int]
    # FLUX and Qwen-Image get their latents packed two by two.
    packed: bool = False


FAMILIES = {
    "UNet2DConditionModel": Family(_unet, 77, (1, 8, 8)),
    "FluxTransformer2DModel": Family(_flux, 512, (1, 8, 8), packed=True),
    "HunyuanVideoTransformer3DModel": Family(_hunyuan, 256, (4, 8, 8)),
    "SD3Transformer2DModel": Family(_sd3, 333, (1, 8, 8)),
    "QwenImageTransformer2DModel": Family(_qwen, 512, (1, 8, 8), packed=True),
    "WanTransformer3DModel": Family(_wan, 512, (4, 8, 8)),
}
