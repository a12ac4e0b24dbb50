"""Model families, one file each: how to encode, call and decode."""

import torch

from ..config import ModelSettings, SamplerSettings
from .base import Conditioning as Conditioning
from .base import GeneratorModel as GeneratorModel


def load_model(settings: ModelSettings, sampler: SamplerSettings, device: torch.device) -> GeneratorModel:
    """The model family that the settings name, on `device`.

    Raises:
        ValueError: an unknown family, a folder that is not one, or a size the model cannot make.
    """
    if settings.family == "flux":
        from .flux import Flux

        return Flux(settings, sampler, device)
    if settings.family == "stable_diffusion":
        from .stable_diffusion import StableDiffusion

        return StableDiffusion(settings, sampler, device)
    raise ValueError(f'model.family: got "{settings.family}", want "flux" or "stable_diffusion"')
