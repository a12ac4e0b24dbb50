"""FLUX: packed latents `[B, tokens, 64]`, a rectified flow, guidance embedded where it was distilled."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..recipe import SamplerSettings
from ..transitions import TransitionTable
from .base import DiffusersModel
from .flow import flow_sigmas, flow_table, shift_for
from .grids import image_grid, unpacked
from .guided import Conditioning


class Flux(DiffusersModel):
    """`FluxTransformer2DModel` with its `AutoencoderKL`, T5 and CLIP, as `FluxPipeline` calls them."""

    family = "flux"
    pipeline = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_tensors = ("prompt_embeds", "pooled_prompt_embeds")

    def _set_up(self, config: Any) -> None:
        self._guided = bool(config.guidance_embeds)
        self._image_ids = image_ids(self._grid).to(self.device, self.dtype)

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        # Latents are packed two by two.
        self._grid = image_grid(sampler, 2 * scale, 2 * scale)
        return (self._grid[0] * self._grid[1], 4 * int(self.vae.config.latent_channels))

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.settings.max_text_tokens or 512
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def unconditional(self, guidance_scale: float) -> None:
        if guidance_scale != 1.0 and not self._guided:
            raise ValueError(
                f"sampler.guidance_scale: got {guidance_scale}, want 1 for a FLUX without guidance embedding"
            )

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        scheduler = self._scheduler()
        mu = shift_for(scheduler, self.latent_shape[0])
        return flow_table(sampler, flow_sigmas(sampler, scheduler, mu), deterministic)

    def _inputs(self, latents: Tensor, times: Tensor, text: Conditioning, guidance_scale: float) -> dict[str, Any]:
        embeds = text["prompt_embeds"]
        return {
            "hidden_states": latents,
            "timestep": times,
            "guidance": torch.full_like(times, guidance_scale) if self._guided else None,
            "pooled_projections": text["pooled_prompt_embeds"],
            "encoder_hidden_states": embeds,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=self.dtype),
            "img_ids": self._image_ids,
        }

    def _unscaled(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        scaled: Tensor = unpacked(latents, self._grid) / config.scaling_factor + config.shift_factor
        return scaled


def image_ids(grid: tuple[int, int], first: int = 0) -> Tensor:
    """Positions `[h w, 3]` of the tokens of a picture; `first` is the first of the three."""
    ids = torch.zeros(*grid, 3)
    ids[..., 0] = first
    ids[..., 1] += torch.arange(grid[0])[:, None]
    ids[..., 2] += torch.arange(grid[1])[None, :]
    return ids.reshape(-1, 3)
