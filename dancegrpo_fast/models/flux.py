"""FLUX: packed latents `[B, tokens, 64]`, a rectified flow, guidance embedded where it was distilled."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts import Prompt
from ..recipe import ModelSettings, SamplerSettings
from ..transitions import TransitionTable
from .base import Conditioning, DiffusersModel, image_grid, to_frames
from .flow import flow_sigmas, flow_table, size_shift


class Flux(DiffusersModel):
    """`FluxTransformer2DModel` with its `AutoencoderKL`, T5 and CLIP, as `FluxPipeline` calls them."""

    family = "flux"
    pipeline = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_tensors = ("prompt_embeds", "pooled_prompt_embeds")

    def __init__(
        self, settings: ModelSettings, sampler: SamplerSettings, device: torch.device, prompts: Sequence[Prompt]
    ) -> None:
        super().__init__(settings, sampler, device, prompts)
        config: Any = self.denoiser.config
        self._guided = bool(config.guidance_embeds)
        ids = torch.zeros(*self._grid, 3)
        ids[..., 1] += torch.arange(self._grid[0])[:, None]
        ids[..., 2] += torch.arange(self._grid[1])[None, :]
        self._image_ids = ids.reshape(-1, 3).to(device, self.dtype)

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
        mu = size_shift(scheduler, self.latent_shape[0])
        return flow_table(sampler, flow_sigmas(sampler, scheduler, mu), deterministic)

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        embeds = conditioning["prompt_embeds"]
        output = denoiser(
            hidden_states=latents.to(self.dtype),
            timestep=times,
            guidance=torch.full_like(times, guidance_scale) if self._guided else None,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=self.dtype),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return output, None

    def decode(self, latents: Tensor) -> Tensor:
        rows, columns = self._grid
        batch, _, channels = latents.shape
        grid = latents.reshape(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        grid = grid.reshape(batch, channels // 4, 2 * rows, 2 * columns)
        config = self.vae.config
        scaled = grid / config.scaling_factor + config.shift_factor
        return to_frames(self.vae.decode(scaled.to(self.frozen_dtype), return_dict=False)[0])
