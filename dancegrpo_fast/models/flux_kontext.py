"""FLUX.1 Kontext: FLUX whose calls have the tokens of a picture to edit after the sample's."""

from typing import Any

import torch
from torch import Tensor

from .flux import Flux, image_ids
from .pictures import WithReference


class FluxKontext(WithReference, Flux):
    """As `FluxKontextPipeline` calls it; the picture to edit is the `image` of a prompt's row."""

    family = "flux_kontext"
    pipeline = "FluxKontextPipeline"

    def _set_up(self, config: Any) -> None:
        super()._set_up(config)
        # The first of a token's three positions tells the picture from the sample.
        reference = image_ids(self._reference_grid, first=1).to(self.device, self.dtype)
        self._image_ids = torch.cat([self._image_ids, reference])

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        config = self.vae.config
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        scaled: Tensor = (latents - config.shift_factor) * config.scaling_factor
        return scaled
