"""Stable Diffusion: latents `[B, 4, H / 8, W / 8]`, variance-preserving diffusion, guidance by an empty prompt."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import transitions
from ..config import ModelSettings, SamplerSettings
from ..prompts import Prompt
from .base import Conditioning, PromptStore, add_lora, check_folder, save_denoiser, to_frames


class StableDiffusion:
    """`UNet2DConditionModel` with its `AutoencoderKL` and DDIM schedule, as `StableDiffusionPipeline` calls them."""

    def __init__(
        self, settings: ModelSettings, sampler: SamplerSettings, device: torch.device, prompts: Sequence[Prompt]
    ) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

        folder = check_folder(settings.path)
        dtype = settings.torch_dtype()
        self.denoiser: nn.Module = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype).to(
            device
        )
        self._vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype).to(device)
        self._vae.requires_grad_(False)
        self._store = PromptStore(folder, ("prompt_embeds",), device)
        self._scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        self._dtype = dtype
        scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        down = scale * 2 ** (len(self.denoiser.config.block_out_channels) - 1)
        height, width = sampler.height, sampler.width
        if height % down or width % down:
            raise ValueError(f"sampler: got height {height}, width {width}, want multiples of {down}")
        self.latent_shape: tuple[int, ...] = (int(self.denoiser.config.in_channels), height // scale, width // scale)
        if settings.lora is not None:
            add_lora(self.denoiser, settings.lora.rank, settings.lora.alpha, settings.lora.target_modules)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        return self._store([prompt.text for prompt in prompts])

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        return None if guidance_scale == 1.0 else self._store([""])

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> transitions.TransitionTable:
        if sampler.shift is not None:
            raise ValueError(f"sampler.shift: got {sampler.shift}, want null for a diffusion model")
        if sampler.kind not in ("ddim", "vp_sde"):
            raise ValueError(f'sampler.kind: got "{sampler.kind}", want "ddim" or "vp_sde" for a diffusion model')
        self._scheduler.set_timesteps(sampler.num_steps)
        if deterministic:
            return transitions.from_scheduler(self._scheduler, "ddim", 0.0)
        return transitions.from_scheduler(self._scheduler, sampler.kind, sampler.eta, sampler.window)

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        latents = latents.to(self._dtype)
        embeds = conditioning["prompt_embeds"].to(self._dtype)
        if unconditional is None:
            return denoiser(latents, times, embeds, return_dict=False)[0], None
        empty = unconditional["prompt_embeds"].to(self._dtype).expand_as(embeds)
        both = denoiser(
            torch.cat([latents, latents]), torch.cat([times, times]), torch.cat([embeds, empty]), return_dict=False
        )[0]
        output, uncond_output = both.chunk(2)
        return output, uncond_output

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self._vae.config.scaling_factor
        return to_frames(self._vae.decode(scaled.to(self._vae.dtype), return_dict=False)[0])

    def save(self, denoiser: nn.Module, folder: Path) -> None:
        from diffusers import StableDiffusionPipeline

        save_denoiser(denoiser, folder, "unet", StableDiffusionPipeline.save_lora_weights)
