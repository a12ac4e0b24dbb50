"""FLUX: packed latents `[B, tokens, 64]`, a rectified flow, guidance embedded where it was distilled."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModelSettings, SamplerSettings
from ..prompts import Prompt
from ..transitions import TransitionTable, shifted_sigmas
from .base import Conditioning, PromptStore, add_lora, check_folder, save_denoiser, to_frames
from .flow import flow_table


class Flux:
    """`FluxTransformer2DModel` with its `AutoencoderKL`, as `FluxPipeline` calls them."""

    def __init__(
        self, settings: ModelSettings, sampler: SamplerSettings, device: torch.device, prompts: Sequence[Prompt]
    ) -> None:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

        folder = check_folder(settings.path)
        dtype = settings.torch_dtype()
        self.denoiser: nn.Module = FluxTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype
        ).to(device)
        self._vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype).to(device)
        self._vae.requires_grad_(False)
        self._store = PromptStore(folder, ("prompt_embeds", "pooled_prompt_embeds"), device)
        self._guided = bool(self.denoiser.config.guidance_embeds)
        self._shift = float(FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").config.shift)
        scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        height, width = sampler.height, sampler.width
        if height % (2 * scale) or width % (2 * scale):
            raise ValueError(f"sampler: got height {height}, width {width}, want multiples of {2 * scale}")
        self._grid = (height // (2 * scale), width // (2 * scale))
        self.latent_shape: tuple[int, ...] = (self._grid[0] * self._grid[1], 4 * int(self._vae.config.latent_channels))
        ids = torch.zeros(*self._grid, 3)
        ids[..., 1] += torch.arange(self._grid[0])[:, None]
        ids[..., 2] += torch.arange(self._grid[1])[None, :]
        self._image_ids = ids.reshape(-1, 3).to(device, dtype)
        if settings.lora is not None:
            add_lora(self.denoiser, settings.lora.rank, settings.lora.alpha, settings.lora.target_modules)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        return self._store([prompt.text for prompt in prompts])

    def unconditional(self, guidance_scale: float) -> None:
        if guidance_scale != 1.0 and not self._guided:
            raise ValueError(
                f"sampler.guidance_scale: got {guidance_scale}, want 1 for a FLUX without guidance embedding"
            )

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        shift = self._shift if sampler.shift is None else sampler.shift
        return flow_table(sampler, shifted_sigmas(sampler.num_steps, shift), deterministic)

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
        dtype = self._image_ids.dtype
        output = denoiser(
            hidden_states=latents.to(dtype),
            timestep=times,
            guidance=torch.full_like(times, guidance_scale) if self._guided else None,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=embeds.to(dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=dtype),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return output, None

    def decode(self, latents: Tensor) -> Tensor:
        rows, columns = self._grid
        batch, _, channels = latents.shape
        grid = latents.reshape(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        grid = grid.reshape(batch, channels // 4, 2 * rows, 2 * columns)
        config = self._vae.config
        scaled = grid / config.scaling_factor + config.shift_factor
        return to_frames(self._vae.decode(scaled.to(self._vae.dtype), return_dict=False)[0])

    def save(self, denoiser: nn.Module, folder: Path) -> None:
        from diffusers import FluxPipeline

        save_denoiser(denoiser, folder, "transformer", FluxPipeline.save_lora_weights)
