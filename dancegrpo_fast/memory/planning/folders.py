"""The parts of a diffusers folder, and how many parameters each has: read off headers and configurations.

Nothing is loaded: a safetensors file says in its header what it holds, and a class made on the `meta` device what its
configuration asks for.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...quantization import linear_layers, stored_in_fewer, wide_in_float16

INDEX = "model_index.json"
# Parts that have no weights.
PLAIN = ("scheduler", "tokenizer", "feature_extractor", "processor", "guider")
# Parts that make the conditions: they run before the denoiser.
ENCODERS = ("text_encoder", "image_encoder", "connectors")
# Parts of a pipeline that no training calls.
UNUSED = ("safety_checker",)
# A weights file of diffusers or transformers: its shard, and its variant before or after that.
_FILE = re.compile(r"(?:diffusion_pytorch_model|model)(\.\w+)?(?:-\d+-of-(\d+))?(\.\w+)?\.safetensors")
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
_FLOATS = ("F64", "F32", "F16", "BF16")
_MOST_HEADER = 100_000_000
# A configuration that its class cannot be made of.
_FAILURES = (OSError, ValueError, KeyError, AttributeError, ImportError, TypeError, RuntimeError)


@dataclass(frozen=True)
class Part:
    """A model beside the denoiser and the VAE.

    Attributes:
        name: what it is.
        parameters: how many.
        source: how they were counted.
        linear: how many of them are weights of linear layers, which quantisation stores in fewer bits.
        wide: how many of the others are float32 where the rest is float16.
    """

    name: str
    parameters: int
    source: str
    linear: int = 0
    wide: int = 0

    def bytes(self, dtype: str, quantization: str = "none") -> int:
        """Of its weights in "bfloat16", "float16" or "float32", linear layers as `quantization` stores them.

        "nf4": half a byte and a float32 scale for 64 weights; "int8" and "fp8": one byte, without the few scales.
        """
        width = WIDTHS[dtype]
        each = {"none": width, "nf4": 0.5 + 4 / 64, "int8": 1, "fp8": 1}[quantization]
        wider = self.wide * (WIDTHS["float32"] - width) if dtype == "float16" else 0
        return round(self.linear * each) + (self.parameters - self.linear) * width + wider


@dataclass(frozen=True)
class Folder:
    """What a pipeline consists of.

    Attributes:
        denoiser, vae: their configurations; the VAE's is {} where there is none.
        encoders: parts that make the conditions.
        others: parts that do something else.
        missing: in words, what is in no count.
        experts: denoisers of one class, which take turns along the steps.
        boundary_ratio: share of the noise at which the second takes over, or None.
        times_per_token: whether the denoiser gets a time for each token.
    """

    denoiser: dict[str, Any]
    vae: dict[str, Any]
    encoders: tuple[Part, ...]
    others: tuple[Part, ...]
    missing: tuple[str, ...]
    experts: int
    boundary_ratio: float | None
    times_per_token: bool


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def header(file: Path) -> dict[str, Any] | None:
    """The tensors of a safetensors file, or None where it is none, such as a pointer to one that was not downloaded."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if not 0 < size <= _MOST_HEADER:
            return None
        try:
            found: dict[str, Any] = json.loads(opened.read(size))
        except ValueError:
            return None
    found.pop("__metadata__", None)
    return found


class Numbers(NamedTuple):
    """How many a model has, and as `Part` has them of these."""

    parameters: int
    linear: int
    wide: int


def stored(folder: Path) -> Numbers | None:
    """Of a folder's safetensors files.

    Of several variants one is counted. None where no variant is there whole, or where its weights are quantised.
    """
    variants: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if match := _FILE.fullmatch(file.name):
            variants.setdefault((match[1] or match[3] or "", match[2] or "1"), []).append(file)
    for (_, shards), files in sorted(variants.items()):
        headers = [header(file) for file in files]
        if len(files) != int(shards) or None in headers:
            continue
        tensors = {name: value for found in headers if found for name, value in found.items()}
        whole = {name: value["shape"] for name, value in tensors.items() if value["dtype"] in _FLOATS}
        if any(value["dtype"] in ("U8", "I8") or value["dtype"].startswith("F8") for value in tensors.values()):
            continue
        linear = [s for name, s in whole.items() if len(s) == 2 and stored_in_fewer(name)]
        wide = [s for name, s in whole.items() if wide_in_float16(name)]
        return Numbers(*(sum(map(prod, shapes)) for shapes in (whole.values(), linear, wide)))
    return None


def counted(model: nn.Module) -> Numbers:
    """Of a model."""
    linear = sum(layer.weight.numel() for layer in linear_layers(model))
    wide = sum(p.numel() for name, p in model.named_parameters() if wide_in_float16(name))
    return Numbers(sum(p.numel() for p in model.parameters()), linear, wide)


def _made(folder: Path, library: str, kind: str) -> nn.Module:
    """A part on the `meta` device."""
    if library == "transformers":
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            made: nn.Module = getattr(transformers, kind)(config)
        return made
    place = "diffusers" if library == "diffusers" else f"diffusers.pipelines.{library}"
    cls = getattr(import_module(place), kind)
    with torch.device("meta"):
        from_config: nn.Module = cls.from_config(cls.load_config(folder))
    return from_config


def part(folder: Path, library: str, kind: str) -> Part | str:
    """A part of a pipeline, or why it cannot be counted."""
    name = folder.name
    if (numbers := stored(folder)) is not None:
        return Part(name, numbers.parameters, f"{kind}: the headers of its files", numbers.linear, numbers.wide)
    if not (folder / "config.json").is_file():
        return f"{name} ({kind}): neither whole safetensors files nor a config.json in {folder}"
    try:
        found = counted(_made(folder, library, kind))
    except _FAILURES as error:
        return f"{name} ({kind}): cannot be made of its config.json ({type(error).__name__}: {error})"
    return Part(name, found.parameters, f"{kind}: its config.json", found.linear, found.wide)


def _listed(index: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, library and class of what a pipeline has."""
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value):
            yield name, value[0], value[1]


def read(folder: Path) -> Folder:
    """What is in a diffusers folder, or in a folder of a denoiser alone.

    Raises:
        ValueError: there is no denoiser's configuration.
    """
    places = [folder / sub for sub in ("transformer", "unet", ".")]
    place = next((path for path in places if (path / "config.json").is_file()), None)
    if place is None:
        raise ValueError(f"model: got the folder {folder}, want transformer/config.json or unet/config.json in it")
    denoiser, vae = _json(place / "config.json"), folder / "vae" / "config.json"
    vae_config = _json(vae) if vae.is_file() else {}
    if not (folder / INDEX).is_file():
        lost = f"text encoders and whatever else the pipeline has: there is no {INDEX} in {folder}"
        return Folder(denoiser, vae_config, (), (), (lost,), 1, None, False)
    index = _json(folder / INDEX)
    encoders: list[Part] = []
    others: list[Part] = []
    missing: list[str] = []
    experts = 1
    for name, library, kind in _listed(index):
        if name in (place.name, "vae") or any(word in name for word in PLAIN):
            continue
        if name.startswith(place.name) and kind == denoiser.get("_class_name"):
            experts += 1
        elif name in UNUSED:
            missing.append(f"{name} ({kind}): no training loads it")
        elif isinstance(found := part(folder / name, library, kind), str):
            missing.append(found)
        else:
            (encoders if name.startswith(ENCODERS) else others).append(found)
    if experts > 2:
        raise ValueError(f"model: got {folder} with {experts} denoisers, want one or two")
    return Folder(
        denoiser,
        vae_config,
        tuple(encoders),
        tuple(others),
        tuple(missing),
        experts,
        index.get("boundary_ratio"),
        bool(index.get("expand_timesteps")),
    )
