"""Trained weights as diffusers' pipelines load them."""

from pathlib import Path
from typing import Any

from torch import nn

from ..experts import SECOND, named, trained


def save(pipeline: str, part: str, denoiser: nn.Module, folder: Path) -> None:
    """Writes denoisers that are trained, whole or their LoRA layers alone.

    Args:
        pipeline: the class in diffusers.
        part: of the first denoiser; the second one's LoRA layers, for which diffusers has the same name, lie in a
            folder of their own.
        denoiser: one, or `Experts`.
        folder: is made.
    """
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    kept = trained(denoiser)
    for name, one in named(denoiser, part).items():
        model: Any = one
        if one not in kept:
            continue
        if not getattr(model, "peft_config", None):
            model.save_pretrained(folder / name)
            continue
        layers = {f"{part}_lora_layers": get_peft_model_state_dict(model)}
        place = folder / name if name == SECOND else folder
        getattr(diffusers, pipeline).save_lora_weights(place, **layers, **_collate_lora_metadata({part: model}))
