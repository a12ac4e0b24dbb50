"""Weights, pictures and texts that a formula gives, so that scores of a project's own code can be written down once."""

from pathlib import Path

import torch

from .tiny_clip import AESTHETIC_WIDTHS, save_clip

PROMPTS = ("a red bird", "two blue cats", "Ein Vogel & ein Fisch")


def spread(shape: torch.Size | tuple[int, ...], number: int) -> torch.Tensor:
    """Float64 in [-1, 1) from whole numbers alone, others for every number."""
    places = torch.arange(torch.Size(shape).numel())
    mixed = (places * places * 2654435761 + places * (40503 + number)) % 2**32
    return (mixed.double() / 2**31 - 1).view(shape)


def picture(height: int, width: int, number: int = 0) -> torch.Tensor:
    """Smooth but for its edges, uint8 [3, H, W]."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij")
    return ((x * (3 + 4 * number) + y * (5 - number) + c * 40 * (1 + number)) % 510 - 255).abs().byte()


def clip_folder(folder: Path) -> Path:
    """A tiny `CLIPModel` and its tokenizer; the scale of its logits is 100."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(save_clip(folder))
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            if weight.ndim == 0:
                weight.copy_(torch.tensor(100.0, dtype=torch.float64).log())
            elif weight.ndim == 1:
                weight.copy_(0.2 * spread(weight.shape, number) + float("norm" in name and name.endswith("weight")))
            else:
                weight.copy_(1.5 * weight.shape[-1] ** -0.5 * spread(weight.shape, number))
    model.save_pretrained(folder)
    return folder


def aesthetic_layers() -> dict[str, torch.Tensor]:
    """Of the aesthetic predictor on that CLIP, named as published."""
    layers = {}
    for number, (into, out) in AESTHETIC_WIDTHS.items():
        layers[f"layers.{number}.weight"] = (1.5 * into**-0.5 * spread((out, into), number)).float()
        layers[f"layers.{number}.bias"] = spread((out,), number + 20).float()
    return layers
