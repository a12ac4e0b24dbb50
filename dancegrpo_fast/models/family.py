"""The families by name, and a folder held to the one that a recipe names before anything of it is loaded."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

from ..recipe import ModelSettings, SamplerSettings
from .base import DiffusersModel
from .loading import CONFIG, pipeline_index
from .pictures import WithReference

FAMILIES = {
    "flux": "flux:Flux",
    "flux_kontext": "flux_kontext:FluxKontext",
    "stable_diffusion": "stable_diffusion:StableDiffusion",
    "hunyuan_video": "hunyuan_video:HunyuanVideo",
    "skyreels_i2v": "skyreels_i2v:SkyReelsI2V",
    "sd3": "sd3:StableDiffusion3",
    "qwen_image": "qwen_image:QwenImage",
    "qwen_image_edit": "qwen_image_edit:QwenImageEdit",
    "wan": "wan:Wan",
}

# Pipelines that a family is called as, beside its own.
_OTHER_PIPELINES = {"QwenImageEditPipeline": "qwen_image_edit"}


def family_of(settings: ModelSettings) -> type[DiffusersModel]:
    """The class of the family that a recipe names.

    Of a name on the hub only the index is fetched.

    Raises:
        ValueError: no such family, a dtype it is not trained in, a file for a folder, a hub that cannot be reached, or
            configurations of another family.
    """
    name = settings.family
    family = _named(name)
    _check_reference(settings, family)
    _check_path(settings.path, family)
    if settings.dtype == "float16" and not family.float16:
        able = ", ".join(other for other in FAMILIES if _class(other).float16)
        raise ValueError(f'model.dtype: got "float16" for {name}, want "bfloat16" or "float32"; float16 is for {able}')
    index = pipeline_index(settings.path)
    _check_pipeline(settings, index.get("_class_name"))
    kind, place = _denoiser(settings, family.denoiser_part, index)
    if kind is not None and kind != family.denoiser_class:
        right = [other for other in FAMILIES if _class(other).denoiser_class == kind]
        wanted = " or ".join(f'"{other}"' for other in right) or "another model, which no family here is for"
        raise ValueError(f'model.family: got "{name}" for the {kind} of {place}, want {wanted}')
    others = [part for part, what in index.items() if part.startswith("text_encoder") and what and what != [None, None]]
    if unknown := sorted(set(others) - set(family.text_parts)):
        raise ValueError(
            f'model.family: got "{name}" for {settings.path}, a {index.get("_class_name")} with {unknown[0]}, want the '
            f"family of that pipeline; {name} has {', '.join(family.text_parts)}"
        )
    return family


def _check_path(path: str, family: type[DiffusersModel]) -> None:
    if not Path(path).is_file():
        return
    import diffusers

    made = "which diffusers makes of no single file of this family"
    if hasattr(getattr(diffusers, family.pipeline), "from_single_file"):
        call = f'{family.pipeline}.from_single_file({json.dumps(path)}).save_pretrained("FOLDER")'
        line = shlex.join(["python", "-c", f"from diffusers import {family.pipeline}; {call}"])
        made = f"which this makes once: {line}"
    raise ValueError(f"model.path: got the file {path}, want a diffusers folder, {made}")


def _check_pipeline(settings: ModelSettings, pipeline: str | None) -> None:
    """Raises ValueError where a folder is of another family's pipeline; its denoiser may come from elsewhere."""
    owners = {_class(name).pipeline: name for name in FAMILIES} | _OTHER_PIPELINES
    owner = owners.get(pipeline or "", settings.family)
    if settings.denoiser is None and owner != settings.family:
        raise ValueError(f'model.family: got "{settings.family}" for the {pipeline} of {settings.path}, want "{owner}"')


def reference_size(settings: ModelSettings, sampler: SamplerSettings) -> tuple[int, int]:
    """Height and width in pixels of the picture whose tokens are in every call; 0, 0 in a family without one.

    Raises:
        ValueError: no such family, or settings of one in a family without.
    """
    family = _named(settings.family)
    _check_reference(settings, family)
    return family.reference_size(settings, sampler)


def _check_reference(settings: ModelSettings, family: type[DiffusersModel]) -> None:
    if settings.reference_height is not None and not issubclass(family, WithReference):
        able = ", ".join(other for other in FAMILIES if issubclass(_class(other), WithReference))
        raise ValueError(
            f"model.reference_height: got {settings.reference_height} for {settings.family}, want null; {able} edit a "
            "picture"
        )


def _named(name: str) -> type[DiffusersModel]:
    if name not in FAMILIES:
        raise ValueError(f'model.family: got "{name}", want one of {", ".join(FAMILIES)}')
    return _class(name)


def _class(name: str) -> type[DiffusersModel]:
    module, _, attribute = FAMILIES[name].partition(":")
    found: type[DiffusersModel] = getattr(importlib.import_module(f".{module}", __package__), attribute)
    return found


def _denoiser(settings: ModelSettings, part: str, index: dict[str, Any]) -> tuple[str | None, str]:
    """The class of the denoiser, where it can be known, and where that stands."""
    where = settings.path if settings.denoiser is None else settings.denoiser
    folders = [Path(where) / part, *([Path(where)] if settings.denoiser is not None else [])]
    for folder in folders:
        if (folder / CONFIG).is_file():
            try:
                return json.loads((folder / CONFIG).read_bytes()).get("_class_name"), str(folder)
            except (ValueError, AttributeError):
                return None, str(folder)
    if settings.denoiser is not None:
        return None, where
    for name in dict.fromkeys((part, "transformer", "unet")):
        if index.get(name):
            return index[name][1], where
    return None, where
