"""Model families, one file each: how to encode, call and decode."""

import torch

from ..config import ModelSettings, SamplerSettings
from ..patch import accelerate
from .base import Conditioning as Conditioning
from .base import GeneratorModel as GeneratorModel


def load_model(settings: ModelSettings, sampler: SamplerSettings, device: torch.device) -> GeneratorModel:
    """The model family that the settings name, on `device`.

    Raises:
        ValueError: an unknown family, a folder that is not one, or a size the model cannot make.
    """
    model: GeneratorModel
    if settings.family == "flux":
        from .flux import Flux

        model = Flux(settings, sampler, device)
    elif settings.family == "stable_diffusion":
        from .stable_diffusion import StableDiffusion

        model = StableDiffusion(settings, sampler, device)
    else:
        raise ValueError(f'model.family: got "{settings.family}", want "flux" or "stable_diffusion"')
    if settings.block_ops != "off":
        try:
            accelerate(model.denoiser, settings.block_ops)
        except ValueError as error:
            raise ValueError(f'model.block_ops: got "{settings.block_ops}", {error}') from error
    return model
