"""Weights, pictures and texts that a formula gives, so that scores of a project's own code can be written down once."""

from pathlib import Path
from typing import Any, TypeVar

import torch

from dancegrpo_fast.rewards.geneval import COLORS, POSITIONS

from .tiny_clip import AESTHETIC_WIDTHS, save_clip

_Model = TypeVar("_Model", bound=torch.nn.Module)
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


@torch.no_grad()
def fill(model: _Model) -> _Model:
    """Weights by the order of their names; those of norms are about 1, and the scale of logits is 100."""
    for number, (name, weight) in enumerate(sorted(model.named_parameters())):
        if weight.ndim == 0:
            weight.copy_(torch.tensor(100.0, dtype=torch.float64).log())
        elif weight.ndim == 1:
            weight.copy_(0.2 * spread(weight.shape, number) + float(name.endswith("weight")))
        else:
            weight.copy_(1.5 * weight.shape[-1] ** -0.5 * spread(weight.shape, number))
    return model


def clip_folder(folder: Path) -> Path:
    """A tiny `CLIPModel` and its tokenizer; the scale of its logits is 100."""
    from transformers import CLIPModel

    model = fill(CLIPModel.from_pretrained(save_clip(folder)))
    model.save_pretrained(folder)
    return folder


def aesthetic_layers() -> dict[str, torch.Tensor]:
    """Of the aesthetic predictor on that CLIP, named as published."""
    layers = {}
    for number, (into, out) in AESTHETIC_WIDTHS.items():
        layers[f"layers.{number}.weight"] = (1.5 * into**-0.5 * spread((out, into), number)).float()
        layers[f"layers.{number}.bias"] = spread((out,), number + 20).float()
    return layers


OBJECTS = ("cat", "dog", "bird", "horse", "cow", "bear", "zebra", "giraffe", "sheep")


def boxes(count: int) -> torch.Tensor:
    """Of pairs of objects, whole numbers, float64 [count, 2, 4]: left, top, right, bottom."""
    corners, sizes = spread((2, count, 2, 2), 3)
    low = (10 + 10 * corners).floor()
    return torch.cat([low, low + (16 + 15 * sizes).floor()], dim=-1)


def scene(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve discs of a detector, some faint: logits of OBJECTS and of nothing [12, 10], of masks [12, 37, 45]."""
    first, second, third, fourth = spread((4, 12), 5 + number)
    logits = torch.zeros(12, len(OBJECTS) + 1)
    logits[torch.arange(12), (torch.arange(12) * (number + 1)) % 3] = (5.5 + 4 * first).round(decimals=2).float()
    y, x = torch.meshgrid(torch.arange(37), torch.arange(45), indexing="ij")
    away = (y - (18 + 16 * second).floor()[:, None, None]) ** 2 + (x - (22 + 20 * third).floor()[:, None, None]) ** 2
    return logits, ((7 + 6 * fourth).floor()[:, None, None] ** 2 - away).float() / 2


def wishes() -> list[dict[str, Any]]:
    """Columns of GenEval's prompts, of every tag."""
    three = [{"class": name, "count": 1} for name in OBJECTS[:3]]
    found: list[dict[str, Any]] = [{"tag": "single_object", "include": [one]} for one in three]
    found += [{"tag": "two_object", "include": [three[0], other]} for other in three[1:]]
    for one in three:
        for count in (1, 2, 3):
            wanted, more = one | {"count": count}, one | {"count": count + 1}
            found.append({"tag": "counting", "include": [wanted], "exclude": [more]})
    for color in COLORS:
        cat, dog = three[0] | {"color": color}, three[1] | {"color": color}
        found.append({"tag": "colors", "include": [cat | {"count": 2}]})
        found.append({"tag": "color_attr", "include": [cat, dog]})
    for relation in POSITIONS:
        found.append({"tag": "position", "include": [three[0], three[1] | {"position": (relation, 0)}]})
        found.append({"tag": "position", "include": [three[2], three[0] | {"position": (relation, 0), "count": 2}]})
    return found


QUESTIONS = ("a {fox} runs", "two dogs, and the camera follows: 100% snow")


def clip(length: int, height: int, width: int, number: int) -> torch.Tensor:
    """A picture that moves, uint8 [T, 3, H, W]."""
    return torch.stack([picture(height, width, number).roll(3 * frame, dims=2) for frame in range(length)])
