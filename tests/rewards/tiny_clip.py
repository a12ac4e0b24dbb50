"""A CLIP of two and three layers with the real classes, in ordinary folders, and images to show it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dancegrpo_fast.rewards import RewardInput

HEADS = 16
IMAGE_SIZE = 28
CONTEXT = 20
# Height and width of images: larger, as large and smaller than the tower's, upright and lying.
SIZES = [(37, 45), (28, 28), (90, 61), (17, 30)]
PROMPTS = ("a red bird", "two blue cats", "Ein Vogel & ein Fisch", "a red bird")
_MERGES = ("r e", "re d</w>", "b i", "bi r", "bir d</w>", "c a", "ca t", "cat s</w>")


def bytes_as_text() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in plain] + [chr(0x100 + i) for i in range(256 - len(plain))]


def save_tokenizer(folder: Path) -> int:
    """Writes a tokenizer through the real class; returns the number of its words, start and end being the last."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = bytes_as_text()
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in _MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(_MERGES) + "\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return len(words)


def save_clip(folder: Path, seed: int = 0, image_size: int = IMAGE_SIZE) -> Path:
    """A `CLIPModel` and its tokenizer in one folder."""
    from transformers import CLIPConfig, CLIPModel

    words = save_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": HEADS, "initializer_factor": 1.0}
    config = CLIPConfig(
        text_config={
            "vocab_size": words,
            "num_hidden_layers": 2,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            **sizes,
        },
        vision_config={"image_size": image_size, "patch_size": 14, "num_hidden_layers": 3, **sizes},
        projection_dim=24,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    stir(model)
    model.save_pretrained(folder)
    return folder


AESTHETIC_WIDTHS = {0: (24, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def aesthetic_layers() -> dict[str, torch.Tensor]:
    """Random layers of the aesthetic predictor, named as published."""
    torch.manual_seed(0)
    layers = {f"layers.{i}.weight": torch.randn(b, a) / a**0.5 for i, (a, b) in AESTHETIC_WIDTHS.items()}
    return layers | {f"layers.{i}.bias": torch.randn(b) for i, (_, b) in AESTHETIC_WIDTHS.items()}


def affine_map(layers: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The five layers as one, matrix [1, 24] and offset [1]."""
    matrix, offset = torch.eye(24, dtype=dtype), torch.zeros(24, dtype=dtype)
    for i in AESTHETIC_WIDTHS:
        weight = layers[f"layers.{i}.weight"].to(dtype)
        matrix, offset = weight @ matrix, weight @ offset + layers[f"layers.{i}.bias"].to(dtype)
    return matrix, offset


@torch.no_grad()
def stir(model: torch.nn.Module) -> None:
    """Weights so large that images and prompts differ well, biases and norms that do something."""
    for parameter in model.parameters():
        if parameter.ndim:
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(spread * torch.randn_like(parameter))


def make_inputs(count: int = 4, length: int = 1, height: int = 37, width: int = 45, **changes: Any) -> RewardInput:
    """Coloured noise over gradients on the 8-bit grid."""
    generator = torch.Generator().manual_seed(count * 1000 + length)
    coarse = torch.rand(count * length, 3, 5, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    frames = (noisy.clamp(0, 1) * 255).round().div(255).unflatten(0, (count, length))
    given: dict[str, Any] = {
        "frames": frames,
        "prompts": [PROMPTS[i % len(PROMPTS)] for i in range(count)],
        "group": torch.arange(count) // 2,
        "meta": [{}] * count,
    }
    return RewardInput(**(given | changes))


def as_pil(frame: torch.Tensor) -> Any:
    """A PIL image of float32 [3, H, W]."""
    from PIL import Image

    return Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def pillow_processor(size: int) -> Any:
    """transformers' image processor of CLIP on Pillow, under its name in version 4 or 5."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    return Processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def without(weight: str, folder: Path, copy: Path) -> Path:
    """A copy of a model's folder that lacks a weight."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    del weights[weight]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
