"""HunyuanVideo: a rectified flow over latents `[B, 16, (frames - 1) / 4 + 1, H / 8, W / 8]`; one frame is an image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..recipe import SamplerSettings
from ..transitions import TransitionTable
from .base import DiffusersModel
from .flow import flow_sigmas, flow_table
from .grids import video_grid
from .guided import Conditioning


class HunyuanVideo(DiffusersModel):
    """`HunyuanVideoTransformer3DModel` with its VAE, Llama and CLIP, as `HunyuanVideoPipeline` calls them."""

    family = "hunyuan_video"
    pipeline = "HunyuanVideoPipeline"
    denoiser_class = "HunyuanVideoTransformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_tensors = ("prompt_embeds", "prompt_mask", "pooled_prompt_embeds")
    mask = "prompt_mask"
    padded = ("prompt_embeds", "prompt_mask")

    def _set_up(self, config: Any) -> None:
        self._guided = bool(config.guidance_embeds)

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        space, time = int(self.vae.spatial_compression_ratio), int(self.vae.temporal_compression_ratio)
        # The denoiser takes patches of two by two latents.
        return (int(self.vae.config.latent_channels), *video_grid(sampler, 2 * space, space, time))

    def _encode_text(self, pipeline: Any, text: str) -> Mapping[str, Tensor]:
        embeds, pooled, mask = pipeline.encode_prompt(text, device=self.device, max_sequence_length=self._most_tokens)
        return {"prompt_embeds": embeds, "prompt_mask": mask, "pooled_prompt_embeds": pooled}

    @property
    def _most_tokens(self) -> int:
        return self.settings.max_text_tokens or 256

    def _count_tokens(self, pipeline: Any, text: str) -> int:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        asked = pipeline.tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(text)).input_ids
        return min(len(asked) - int(DEFAULT_PROMPT_TEMPLATE["crop_start"]), self._most_tokens)

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        if guidance_scale != 1.0 and not (self._guided or self.negative):
            raise ValueError(
                f"sampler.guidance_scale: got {guidance_scale}, want 1 for a HunyuanVideo without guidance embedding"
            )
        return super().unconditional(guidance_scale)

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        return flow_table(sampler, flow_sigmas(sampler, self._scheduler()), deterministic)

    def _embedded_guidance(self, guidance_scale: float) -> float:
        return guidance_scale

    def _inputs(self, latents: Tensor, times: Tensor, text: Conditioning, guidance_scale: float) -> dict[str, Any]:
        guidance = None
        if self._guided:
            # In the model's dtype before the factor, as the pipeline rounds it.
            level = torch.full_like(times, self._embedded_guidance(guidance_scale), dtype=self.dtype)
            guidance = level * 1000.0
        return {
            "hidden_states": latents,
            "timestep": times * 1000.0,
            "encoder_hidden_states": text["prompt_embeds"],
            "encoder_attention_mask": text["prompt_mask"],
            "pooled_projections": text["pooled_prompt_embeds"],
            "guidance": guidance,
        }

    def _unscaled(self, latents: Tensor) -> Tensor:
        scaled: Tensor = latents.to(self.frozen_dtype) / self.vae.config.scaling_factor
        return scaled
