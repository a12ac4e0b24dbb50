"""Qwen-Image: packed latents `[B, tokens, 64]`, a rectified flow, guidance by a negative prompt that keeps the norm."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..recipe import SamplerSettings
from ..transitions import TransitionTable
from .base import DiffusersModel
from .flow import flow_sigmas, flow_table, shift_for
from .grids import image_grid, unpacked
from .guided import Conditioning


class QwenImage(DiffusersModel):
    """`QwenImageTransformer2DModel` with `AutoencoderKLQwenImage` and Qwen2.5-VL, as `QwenImagePipeline` calls them.

    Prompts have different lengths: all are padded to the longest of the run, with their mask in every call, so that a
    row's arithmetic depends on no other row.
    """

    family = "qwen_image"
    pipeline = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    text_tensors = ("prompt_embeds", "prompt_embeds_mask")
    mask = "prompt_embeds_mask"
    padded = text_tensors
    negative = True

    def _set_up(self, config: Any) -> None:
        if config.guidance_embeds:
            raise ValueError(f"model.path: got {self.settings.path}, want a Qwen-Image without guidance embedding")

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        scale = 2 ** len(self.vae.config.temperal_downsample)
        # Latents are packed two by two.
        self._grid = image_grid(sampler, 2 * scale, 2 * scale)
        return (self._grid[0] * self._grid[1], 4 * int(self.vae.config.z_dim))

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        embeds, mask = pipeline.encode_prompt(text, device=self.device, max_sequence_length=self._most_tokens)
        return self._padded(embeds, mask)

    def _padded(self, embeds: Tensor, mask: Tensor | None) -> Mapping[str, Tensor]:
        """A row of as many tokens as any has; the pipeline gives no mask where all tokens are the prompt's."""
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device) if mask is None else mask
        missing = self._most_tokens - embeds.shape[1]
        return {
            "prompt_embeds": F.pad(embeds, (0, 0, 0, missing)),
            "prompt_embeds_mask": F.pad(mask.to(torch.int64), (0, missing)),
        }

    @property
    def _most_tokens(self) -> int:
        return self.settings.max_text_tokens or 512

    def _count_tokens(self, pipeline: Any, text: str) -> int:
        asked = pipeline.tokenizer(pipeline.prompt_template_encode.format(text)).input_ids
        return min(len(asked) - int(pipeline.prompt_template_encode_start_idx), self._most_tokens)

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        scheduler = self._scheduler()
        mu = shift_for(scheduler, self.latent_shape[0])
        return flow_table(sampler, flow_sigmas(sampler, scheduler, mu), deterministic)

    def _inputs(self, latents: Tensor, times: Tensor, text: Conditioning, guidance_scale: float) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": times,
            "encoder_hidden_states": text["prompt_embeds"],
            "encoder_hidden_states_mask": text["prompt_embeds_mask"],
            "img_shapes": [[(1, *self._grid)]] * len(latents),
        }

    def _guide(self, output: Tensor, uncond_output: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
        # The pipeline gives every guided token the norm of its conditional one, which is no longer linear in the two.
        output, uncond_output = output.float(), uncond_output.float()
        guided = uncond_output + guidance_scale * (output - uncond_output)
        return guided * (output.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), None

    def _unscaled(self, latents: Tensor) -> Tensor:
        return unscaled(self.vae, unpacked(latents, self._grid).unsqueeze(2))


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents `[B, C, T, H, W]` with the mean and standard deviation that the VAE gives each channel."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def scaled(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `unscaled`."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def _statistics(vae: Any, like: Tensor) -> list[Tensor]:
    return [like.new_tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")]
