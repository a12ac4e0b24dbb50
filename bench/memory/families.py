"""Small real models of every family that the planner knows, larger in activations than in weights."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.lora import add_lora
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.patch import accelerate

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 4


@dataclass(frozen=True)
class Family:
    """A configuration of a diffusers class, and the call: sizes in pixels, text tokens, rows."""

    name: str
    denoiser: str
    config: dict[str, Any]
    frames: int
    height: int
    width: int
    text_tokens: int
    rows: int = 2

    @property
    def patched(self) -> bool:
        """Whether `accelerate` knows its blocks."""
        return self.denoiser != "UNet2DConditionModel"

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """As the planner takes them: frames, height, width, rows, text tokens."""
        return self.frames, self.height, self.width, self.rows, self.text_tokens

    def spec(self, folder: Path) -> specs.Spec:
        """What the planner reads from a diffusers folder, which is written into `folder`."""
        target = folder / self.name.replace(" ", "-") / "transformer"
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps({"_class_name": self.denoiser, **self.config}))
        return specs.resolve(target.parent)


def _families() -> Iterator[Family]:
    """Of `families.json`; lists are tuples to diffusers."""
    for found in json.loads(Path(__file__).with_suffix(".json").read_text()):
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in found["config"].items()}
        yield Family(**{**found, "config": config})


FAMILIES = tuple(_families())


def prepare(model: nn.Module, lora: torch.dtype | None, patch: str, rank: int = RANK) -> nn.Module:
    """LoRA layers of some dtype, or none, and block ops, on `meta` as on a real model; `patch`: "mode, recompute"."""
    if lora is not None:
        with torch.device(next(model.parameters()).device):
            add_lora(model, rank, rank, TARGETS)
        for p in model.parameters():
            p.data = p.data.to(lora) if p.requires_grad else p.data
    if patch != "off":
        mode, recompute = patch.split(", ")
        # Trimming reads the mask, and fake ones have no values.
        accelerate(model, mode, recompute=recompute, trim_text=False)
    return model


def real(spec: specs.Spec, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The model with random weights, as diffusers would load it in `dtype`."""
    import diffusers

    cls: Callable[..., nn.Module] = getattr(diffusers, spec.denoiser)
    torch.manual_seed(0)
    with torch.device(device):
        return specs.cast(cls(**spec.config), dtype, spec.keep_in_float32).train()


def real_inputs(
    spec: specs.Spec, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What the model is called with, drawn; `sizes` as `Family.sizes`."""
    found = specs.inputs(spec, *sizes, device=device, dtype=dtype)
    for value in found.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.normal_()
    return found
