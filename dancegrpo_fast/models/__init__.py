"""Model families, one file each: how to encode, call and decode."""

from collections.abc import Sequence

import torch

from ..config import ModelSettings, SamplerSettings
from ..memory import checkpointing
from ..patch import accelerate
from ..prompts import Prompt
from .base import Conditioning as Conditioning
from .base import GeneratorModel as GeneratorModel


def load_model(
    settings: ModelSettings, sampler: SamplerSettings, device: torch.device, prompts: Sequence[Prompt]
) -> GeneratorModel:
    """The model family that the settings name, on `device`, ready to encode `prompts`.

    Raises:
        ValueError: an unknown family, a folder that is not one, or a size the model cannot make.
    """
    model: GeneratorModel
    if settings.family == "flux":
        from .flux import Flux

        model = Flux(settings, sampler, device, prompts)
    elif settings.family == "stable_diffusion":
        from .stable_diffusion import StableDiffusion

        model = StableDiffusion(settings, sampler, device, prompts)
    else:
        raise ValueError(f'model.family: got "{settings.family}", want "flux" or "stable_diffusion"')
    if settings.block_ops != "off":
        try:
            accelerate(model.denoiser, settings.block_ops)
        except ValueError as error:
            raise ValueError(f'model.block_ops: got "{settings.block_ops}", {error}') from error
    try:
        checkpointing.apply(model.denoiser, settings.checkpointing)
    except ValueError as error:
        raise ValueError(f'model.checkpointing: got "{settings.checkpointing}", {error}') from error
    return model
