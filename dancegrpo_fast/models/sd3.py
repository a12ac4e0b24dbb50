"""Stable Diffusion 3 and 3.5: latents `[B, 16, H / 8, W / 8]`, a rectified flow, guidance by a negative prompt."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..recipe import SamplerSettings
from ..transitions import TransitionTable
from .base import DiffusersModel
from .flow import flow_sigmas, flow_table, shift_for
from .grids import image_grid
from .guided import Conditioning


class StableDiffusion3(DiffusersModel):
    """`SD3Transformer2DModel` with `AutoencoderKL`, two CLIPs and T5, as `StableDiffusion3Pipeline` calls them."""

    family = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    text_tensors = ("prompt_embeds", "pooled_prompt_embeds")
    negative = True
    float16 = True

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        # The transformer's patches are two by two.
        return (int(self.vae.config.latent_channels), *image_grid(sampler, 2 * scale, scale))

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_text_tokens or 256,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        scheduler, mu = self._scheduler(), None
        if scheduler.config.use_dynamic_shifting:
            mu = shift_for(scheduler, self.latent_shape[1] * self.latent_shape[2] // 4)
        return flow_table(sampler, flow_sigmas(sampler, scheduler, mu, linear=False), deterministic)

    def _inputs(self, latents: Tensor, times: Tensor, text: Conditioning, guidance_scale: float) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": 1000 * times,
            "encoder_hidden_states": text["prompt_embeds"],
            "pooled_projections": text["pooled_prompt_embeds"],
        }

    def _unscaled(self, latents: Tensor) -> Tensor:
        scaled: Tensor = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return scaled
