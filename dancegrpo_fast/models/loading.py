"""Where a model's parts are, on this host or on the hub, and how its denoiser comes into the processes of a run."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..memory.planning import specs
from ..processes import is_sharded

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"


def loaded_in(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`from_pretrained`'s argument for the dtype of weights, which newer diffusers call otherwise."""
    from diffusers.pipelines import pipeline_utils

    return {"dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype": dtype}


def is_hub_name(path: str) -> bool:
    """Whether it looks like `owner/name`, and is no path that exists."""
    return not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "/"))


def find_folder(path: str, *without: str) -> Path:
    """A local diffusers folder, or the local snapshot of a model on the hub, downloaded where it is not there yet.

    Args:
        path: the folder, or the name on the hub.
        without: parts that need not be downloaded.

    Raises:
        ValueError: neither, or the hub cannot be reached.
    """
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    if not is_hub_name(path):
        raise ValueError(f"model.path: got {path}, want a diffusers folder (no model_index.json there) or a hub name")
    from diffusers import DiffusionPipeline

    # Parts that no family here uses.
    unused = ("safety_checker", "feature_extractor", "image_encoder", "image_processor", *without)
    try:
        return Path(DiffusionPipeline.download(path, **dict.fromkeys(unused)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: got {path}, want a diffusers folder or a name on the hub that can be reached ({error})"
        ) from error


def pipeline_index(path: str) -> dict[str, Any]:
    """The `model_index.json` of a local folder or of a model on the hub; empty where a folder has none.

    Raises:
        ValueError: it cannot be had, or read.
    """
    from diffusers import DiffusionPipeline

    if not is_hub_name(path) and not (Path(path) / DiffusionPipeline.config_name).is_file():
        return {}
    try:
        return dict(DiffusionPipeline.load_config(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: got {path}, want a diffusers folder or a name on the hub that can be reached ({error})"
        ) from error


def find_denoiser(path: str, part: str) -> Path:
    """The local folder with a denoiser's configuration and weights, downloaded where it is not there yet.

    Args:
        path: a folder or a name on the hub that has them directly, or in the subfolder `part`.
        part: "transformer" or "unet".

    Raises:
        ValueError: neither, or the hub cannot be reached.
    """
    folder = Path(path)
    if is_hub_name(path):
        from huggingface_hub import snapshot_download

        wanted = [f"{where}{file}" for where in ("", f"{part}/") for file in (CONFIG, f"{WEIGHTS}*.safetensors*")]
        try:
            folder = Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns=["*.fp16*", "*.non_ema*"]))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.denoiser: got {path}, want a folder or a name on the hub that can be reached ({error})"
            ) from error
    for where in (folder / part, folder):
        if (where / CONFIG).is_file():
            return where
    raise ValueError(f"model.denoiser: got {path}, want {CONFIG} in it or in its {part}/, or a name on the hub")


def published_as(denoiser: str, folder: Path) -> str:
    """The planner's name of a published denoiser; of any other one its local folder, beside which it knows no VAE."""
    published = {specs.resolve(name).hub: name for name in specs.names()}
    return published.get(denoiser, str(folder))


def without_weights(name: str, folder: Path) -> nn.Module:
    """A denoiser of diffusers' class `name` on the meta device, for what its configuration in `folder` says."""
    import diffusers

    cls = getattr(diffusers, name)
    with torch.device("meta"):
        made: nn.Module = cls.from_config(cls.load_config(folder))
    return made


def load_denoiser(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device, **more: Any) -> nn.Module:
    """A denoiser on the device; where it is split, in the main process's host memory and without weights elsewhere.

    `Processes.prepare` then hands the weights out, so that no host holds them twice and no device holds all.

    Args:
        cls: of diffusers.
        folder: of its configuration and weights.
        dtype: of the weights.
        device: of this process.
        more: arguments of `from_pretrained`.
    """
    from accelerate import PartialState, init_empty_weights

    if not is_sharded():
        return cls.from_pretrained(folder, **loaded_in(dtype), **more).to(device).eval()  # type: ignore[no-any-return]  # untyped
    if PartialState().is_main_process:
        return cls.from_pretrained(folder, **loaded_in(dtype), **more).eval()  # type: ignore[no-any-return]  # untyped
    with init_empty_weights(include_buffers=False):
        empty = cls.from_config(cls.load_config(folder))
    return specs.cast(empty, dtype, tuple(cls._keep_in_fp32_modules or ())).eval()
