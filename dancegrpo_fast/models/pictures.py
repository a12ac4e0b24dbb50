"""The pictures of prompts: read and encoded once by their content, and as tokens beside a sample's."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..prompts import Prompt
from ..prompts.images import check_images, key_of, read_image
from ..recipe import ModelSettings, SamplerSettings
from .base import DiffusersModel
from .grids import packed
from .guided import Conditioning

if TYPE_CHECKING:
    from PIL.Image import Image

Encode = Callable[["Image", str], Tensor]


class Pictures:
    """What is made of the pictures of prompts. The same picture may lie in several places.

    Args:
        encode: makes latents of a picture and the digest of its content.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        # By `key_of`, which opens no file.
        self._digests: dict[str, str] = {}
        self._made: dict[str, Tensor] = {}

    def digest(self, prompt: Prompt) -> str:
        """Of the size and the pixels of a prompt's picture, which is read where it was not yet."""
        key = key_of(*_image(prompt))
        if key not in self._digests:
            self._digests[key] = _digest(self.read(prompt))
        return self._digests[key]

    def read(self, prompt: Prompt) -> "Image":
        """A prompt's picture as RGB."""
        return read_image(key_of(*_image(prompt)), prompt.meta["image"])

    def latents(self, prompt: Prompt) -> Tensor:
        """What `encode` makes of a prompt's picture, kept in host memory."""
        key = key_of(*_image(prompt))
        if self._digests.get(key) not in self._made:
            image = self.read(prompt)
            digest = self._digests[key] = _digest(image)
            if digest not in self._made:
                self._made[digest] = self._encode(image, digest).cpu()
        return self._made[self._digests[key]]

    def has(self, prompts: Sequence[Prompt]) -> bool:
        """Whether `latents` of all of them are there."""
        return all(self._digests.get(key_of(*_image(prompt))) in self._made for prompt in prompts)


def check(prompts: Sequence[Prompt]) -> None:
    """Raises ValueError where a prompt has no picture, or one that cannot be read."""
    check_images(map(_image, prompts))


def pixels_of(image: "Image", height: int, width: int) -> Tensor:
    """`[1, 3, H, W]`, float32 in [-1, 1]: resized as diffusers' pipelines do it."""
    from diffusers.image_processor import VaeImageProcessor

    pixels: Tensor = VaeImageProcessor(vae_scale_factor=1).preprocess(image, height=height, width=width)
    return pixels


def _image(prompt: Prompt) -> tuple[str, Any]:
    return prompt.text, prompt.meta.get("image")


def _digest(image: "Image") -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


class WithReference(DiffusersModel):
    """The shared part of families that edit the picture of a prompt: its tokens follow the sample's in every call.

    The picture is resized to `model.reference_height` and `model.reference_width`, whatever its own shape is. A family
    has packed latents, sets their grid in `_shape`, and defines `_encode_pixels`.
    """

    _grid: tuple[int, int]

    @classmethod
    def check_prompts(cls, prompts: Sequence[Prompt]) -> None:
        check(prompts)

    @classmethod
    def reference_size(cls, settings: ModelSettings, sampler: SamplerSettings) -> tuple[int, int]:
        return settings.reference_height or sampler.height, settings.reference_width or sampler.width

    def _shape(self, sampler: SamplerSettings) -> tuple[int, ...]:
        shape = super()._shape(sampler)
        token = sampler.height // self._grid[0]
        self._reference = self.reference_size(self.settings, sampler)
        for name, size in zip(("height", "width"), self._reference, strict=True):
            if size % token:
                raise ValueError(f"model.reference_{name}: got {size}, want a multiple of {token}")
        self._reference_grid = self._reference[0] // token, self._reference[1] // token
        self._pictures = Pictures(self._encode_picture)
        return shape

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents `[1, C, h, w]` of `[1, 3, H, W]` in [-1, 1], scaled as the denoiser sees them."""
        raise NotImplementedError

    @torch.no_grad()
    def _encode_picture(self, image: "Image", digest: str) -> Tensor:
        """Tokens `[h w, 4 C]` of the reference's grid, of the mode of the VAE's posterior."""
        pixels = pixels_of(image, *self._reference).to(self.device, self.frozen_dtype)
        return packed(self._encode_pixels(pixels).to(self.dtype))[0]

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        reference = torch.stack([self._pictures.latents(prompt) for prompt in prompts])
        return {**super().encode(prompts), "reference": reference.to(self.device)}

    def encodes_with_vae(self, prompts: Sequence[Prompt]) -> bool:
        return not self._pictures.has(prompts)

    def _seen(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.cat([super()._seen(latents, conditioning), conditioning["reference"]], dim=1)

    def _of_sample(self, output: Tensor) -> Tensor:
        return output[:, : self.latent_shape[0]]
