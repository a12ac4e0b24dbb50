"""What the trainer needs of a model family, and what the families share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import SamplerSettings
from ..prompts import Prompt
from ..transitions import TransitionTable

Conditioning = Mapping[str, Tensor]


class GeneratorModel(Protocol):
    """A denoiser with its way to encode prompts, predict and decode.

    Attributes:
        denoiser: the network that is trained.
        latent_shape: one sample's latents, as the denoiser and the kernels see them.
    """

    denoiser: nn.Module
    latent_shape: tuple[int, ...]

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Conditioning tensors, one row per prompt of those the model was loaded for; rows do not depend on others."""
        ...

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        """One row for the second half of a guided batch, or None where the family or the scale needs none."""
        ...

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        """The sampler's table; `deterministic` asks for the family's ODE with the same steps."""
        ...

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Model output at `latents` `[B, *latent_shape]` and `times` `[B]`, and the unconditional one."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[B, T, 3, H, W]`, float32 in [0, 1] on the 8-bit grid."""
        ...

    def save(self, denoiser: nn.Module, folder: Path) -> None:
        """Writes the trained weights as diffusers reads them: a full denoiser, or LoRA weights alone."""
        ...


class PromptStore:
    """Prompt embeddings beside a model: `prompt_embeds/prompts.json` and `embeds.safetensors`, one row per prompt."""

    def __init__(self, folder: Path, names: Sequence[str], device: torch.device) -> None:
        from safetensors.torch import load_file

        files = folder / "prompt_embeds" / "prompts.json", folder / "prompt_embeds" / "embeds.safetensors"
        for file in files:
            if not file.is_file():
                raise ValueError(f"model.path: got {folder}, want prompt embeddings in it ({file} is missing)")
        tensors = load_file(files[1], device=str(device))
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"model.path: {files[1]} lacks {missing}, it holds {sorted(tensors)}")
        self._tensors = {name: tensors[name] for name in names}
        self._rows = {text: row for row, text in enumerate(json.loads(files[0].read_text(encoding="utf-8")))}
        self._folder = folder

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Rows of the given prompts."""
        for prompt in prompts:
            if prompt not in self._rows:
                raise ValueError(f'prompts: got "{prompt}", want one with embeddings in {self._folder}/prompt_embeds')
        rows = torch.tensor([self._rows[prompt] for prompt in prompts])
        return {name: tensor[rows.to(tensor.device)] for name, tensor in self._tensors.items()}


def to_frames(images: Tensor) -> Tensor:
    """VAE output `[B, 3, H, W]` in [-1, 1] to frames `[B, 1, 3, H, W]` in [0, 1], rounded to 8 bits as files are."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().div(255).unsqueeze(1)


def check_folder(path: str) -> Path:
    """A local diffusers folder."""
    folder = Path(path)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model.path: got {path}, want a diffusers folder (no model_index.json there)")
    return folder


def add_lora(denoiser: nn.Module, rank: int, alpha: int, target_modules: Sequence[str]) -> None:
    """Freezes the denoiser and adds peft LoRA layers to the modules whose names end in one of `target_modules`."""
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(target_modules))
    try:
        denoiser.add_adapter(config)  # type: ignore[operator]  # diffusers' PeftAdapterMixin
    except ValueError as error:
        raise ValueError(f"model.lora.target_modules: got {list(target_modules)}, {error}") from error


def save_denoiser(denoiser: nn.Module, folder: Path, subfolder: str, save_lora: Any) -> None:
    """`save_lora` is the pipeline class's `save_lora_weights`; without LoRA layers the whole denoiser is written."""
    if not getattr(denoiser, "peft_config", None):
        denoiser.save_pretrained(folder / subfolder)  # type: ignore[operator]  # diffusers' ModelMixin
        return
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(denoiser)
    save_lora(folder, **{f"{subfolder}_lora_layers": layers}, **_collate_lora_metadata({subfolder: denoiser}))
