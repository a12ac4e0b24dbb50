"""SkyReels image to video: HunyuanVideo whose denoiser also sees the first frame's latents, on 16 more channels."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..prompts import Prompt
from ..prompts.images import check_images, key_of, read_image
from ..rng import generator
from .guided import Conditioning
from .hunyuan_video import HunyuanVideo


class SkyReelsI2V(HunyuanVideo):
    """As `HunyuanSkyreelsImageToVideoPipeline` calls it; the first frame is the `image` of a prompt's row."""

    family = "skyreels_i2v"
    pipeline = "HunyuanSkyreelsImageToVideoPipeline"
    negative = True

    @classmethod
    def check_prompts(cls, prompts: Sequence[Prompt]) -> None:
        check_images(map(_image, prompts))

    def _set_up(self, config: Any) -> None:
        super()._set_up(config)
        # By `key_of`, and of their contents: the same picture may lie in several places.
        self._digests: dict[str, str] = {}
        self._first_frames: dict[str, Tensor] = {}
        channels, latent_channels = int(config.in_channels), self.latent_shape[0]
        if channels != 2 * latent_channels:
            raise ValueError(
                f"model.path: got a denoiser of {channels} input channels, want {2 * latent_channels}: the latents' "
                "and the first frame's"
            )

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        first_frames = torch.stack([self._first_frame(prompt) for prompt in prompts])
        return {**super().encode(prompts), "first_frame": first_frames}

    def encodes_with_vae(self, prompts: Sequence[Prompt]) -> bool:
        return any(key_of(*_image(prompt)) not in self._digests for prompt in prompts)

    def _first_frame(self, prompt: Prompt) -> Tensor:
        """Latents `[C, H', W']` of a picture, drawn from the VAE's posterior with noise that its content seeds."""
        key = key_of(*_image(prompt))
        if key not in self._digests:
            image = read_image(key, prompt.meta["image"])
            digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
            if digest not in self._first_frames:
                self._first_frames[digest] = self._encode_image(image, generator("first frame", digest))
            self._digests[key] = digest
        return self._first_frames[self._digests[key]]

    @torch.no_grad()
    def _encode_image(self, image: object, noise: torch.Generator) -> Tensor:
        from diffusers.video_processor import VideoProcessor

        processor = VideoProcessor(vae_scale_factor=self.vae.spatial_compression_ratio)
        pixels = processor.preprocess(image, height=self.sampler.height, width=self.sampler.width)
        posterior = self.vae.encode(pixels.unsqueeze(2).to(self.device, self.frozen_dtype)).latent_dist
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


def _image(prompt: Prompt) -> tuple[str, Any]:
    return prompt.text, prompt.meta.get("image")
