"""Trained weights from what a run left, put into a denoiser."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..run import checkpoint

LORA_FILE = "pytorch_lora_weights.safetensors"


def load_weights(denoiser: nn.Module, source: Path, weights: str | None = "model") -> str:
    """Puts trained weights into a denoiser and says which.

    Args:
        denoiser: as the recipe makes it.
        source: a run's directory (its newest checkpoint), a checkpoint, or a saved model: a folder with
            `transformer/`, `unet/` or LoRA weights.
        weights: "model", or "ema" of a checkpoint that holds an average; None: the average where there is one.

    Raises:
        ValueError: none of these, or weights of another model.
    """
    found = checkpoint.complete(source / "checkpoints")
    folder = found[-1] if found else source
    if (folder / "state.json").is_file():
        tensors, state = checkpoint.load(folder)
        weights = weights or ("ema" if "ema" in tensors else "model")
        if weights not in tensors:
            raise ValueError(f'weights: got "{weights}", want one of {sorted(tensors.keys() & {"model", "ema"})}')
        _copy(denoiser, tensors[weights], folder)
        return f"iteration {state['iteration']} ({folder}, {weights})"
    if weights not in (None, "model"):
        raise ValueError(f'weights: got "{weights}" of {source}, which is no checkpoint; want "model"')
    target: Any = denoiser
    subfolder = next((name for name in ("transformer", "unet") if (source / name / "config.json").is_file()), None)
    if subfolder is not None:
        _copy(denoiser, type(target).from_pretrained(source, subfolder=subfolder).state_dict(), source)
        return str(source)
    if (source / LORA_FILE).is_file():
        from safetensors import safe_open

        if getattr(denoiser, "peft_config", None):
            target.delete_adapters(list(target.peft_config))
        with safe_open(source / LORA_FILE, "pt") as file:
            prefix = next(iter(file.keys())).partition(".")[0]
        target.load_lora_adapter(source, prefix=prefix, weight_name=LORA_FILE)
        return str(source / LORA_FILE)
    raise ValueError(f"checkpoint: got {source}, want a run's directory, a checkpoint or a saved model")


def _copy(denoiser: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    own = denoiser.state_dict()
    wrong = [name for name, value in tensors.items() if name not in own or own[name].shape != value.shape]
    if wrong or not tensors:
        raise ValueError(f"checkpoint: {source} holds {wrong[0] if wrong else 'nothing'}, which this model lacks")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
