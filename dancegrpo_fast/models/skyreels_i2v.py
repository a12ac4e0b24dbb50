"""SkyReels image to video: HunyuanVideo whose denoiser also sees the first frame's latents, on 16 more channels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..prompts import Prompt
from ..rng import generator
from . import pictures
from .guided import Conditioning
from .hunyuan_video import HunyuanVideo


class SkyReelsI2V(HunyuanVideo):
    """As `HunyuanSkyreelsImageToVideoPipeline` calls it; the first frame is the `image` of a prompt's row."""

    family = "skyreels_i2v"
    pipeline = "HunyuanSkyreelsImageToVideoPipeline"
    negative = True

    @classmethod
    def check_prompts(cls, prompts: Sequence[Prompt]) -> None:
        pictures.check(prompts)

    def _set_up(self, config: Any) -> None:
        super()._set_up(config)
        self._pictures = pictures.Pictures(self._first_frame)
        channels, latent_channels = int(config.in_channels), self.latent_shape[0]
        if channels != 2 * latent_channels:
            raise ValueError(
                f"model.path: got a denoiser of {channels} input channels, want {2 * latent_channels}: the latents' "
                "and the first frame's"
            )

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        first_frames = torch.stack([self._pictures.latents(prompt) for prompt in prompts])
        return {**super().encode(prompts), "first_frame": first_frames.to(self.device)}

    def encodes_with_vae(self, prompts: Sequence[Prompt]) -> bool:
        return not self._pictures.has(prompts)

    @torch.no_grad()
    def _first_frame(self, image: object, digest: str) -> Tensor:
        """Latents `[C, H', W']` of a picture, drawn from the VAE's posterior with noise that its content seeds."""
        pixels = pictures.pixels_of(image, self.sampler.height, self.sampler.width)
        posterior = self.vae.encode(pixels.unsqueeze(2).to(self.device, self.frozen_dtype)).latent_dist
        noise = generator("first frame", digest)
        latents: Tensor = posterior.sample(noise)[0, :, 0].float() * self.vae.config.scaling_factor
        return latents.to(self.dtype)

    def _seen(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        first = conditioning["first_frame"]
        batch, channels, frames = latents.shape[:3]
        # The frames to come are zero: kept here, not in the conditioning, they are built once per call.
        padded = torch.cat([first.unsqueeze(2), first.new_zeros(batch, channels, frames - 1, *first.shape[2:])], dim=2)
        return torch.cat([latents.to(self.dtype), padded], dim=1)

    def _embedded_guidance(self, guidance_scale: float) -> float:
        # Guided by the batch; what is embedded is "no guidance".
        return 1.0
