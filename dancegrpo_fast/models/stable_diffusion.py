"""Stable Diffusion: latents `[B, 4, H / 8, W / 8]`, variance-preserving diffusion, guidance by a negative prompt."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import transitions
from ..recipe import SamplerSettings
from .base import DiffusersModel
from .grids import image_grid
from .guided import Conditioning


class StableDiffusion(DiffusersModel):
    """`UNet2DConditionModel` with `AutoencoderKL`, CLIP and DDIM schedule, as `StableDiffusionPipeline` calls them."""

    family = "stable_diffusion"
    pipeline = "StableDiffusionPipeline"
    denoiser_part = "unet"
    denoiser_class = "UNet2DConditionModel"
    text_parts = ("text_encoder", "tokenizer")
    text_tensors = ("prompt_embeds",)
    negative = True
    float16 = True
    # As the pipeline: its last step ends at the schedule's first alpha, which is not 1.
    decodes_x0 = False

    def _set_up(self, config: Any) -> None:
        image_grid(self.sampler, self._scale * 2 ** (len(config.block_out_channels) - 1), self._scale)

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        if self.settings.max_text_tokens is not None:
            raise ValueError(
                f"model.max_text_tokens: got {self.settings.max_text_tokens}, want null for Stable Diffusion, whose "
                "CLIP has one length"
            )
        self._scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (int(self.vae.config.latent_channels), *image_grid(sampler, self._scale, self._scale))

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        embeds, _ = pipeline.encode_prompt(text, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> transitions.TransitionTable:
        if sampler.shift is not None:
            raise ValueError(f"sampler.shift: got {sampler.shift}, want null for a diffusion model")
        if sampler.kind not in ("ddim", "vp_sde"):
            raise ValueError(f'sampler.kind: got "{sampler.kind}", want "ddim" or "vp_sde" for a diffusion model')
        # The pipeline sets these two whatever the folder says.
        scheduler = self._scheduler("DDIMScheduler", clip_sample=False, steps_offset=1)
        scheduler.set_timesteps(sampler.num_steps)
        if deterministic:
            return transitions.from_scheduler(scheduler, "ddim", 0.0)
        return transitions.from_scheduler(scheduler, sampler.kind, sampler.eta, sampler.window)

    def _inputs(self, latents: Tensor, times: Tensor, text: Conditioning, guidance_scale: float) -> dict[str, Any]:
        return {"sample": latents, "timestep": times, "encoder_hidden_states": text["prompt_embeds"]}

    def _unscaled(self, latents: Tensor) -> Tensor:
        scaled: Tensor = latents / self.vae.config.scaling_factor
        return scaled
