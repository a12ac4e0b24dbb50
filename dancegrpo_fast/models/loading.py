"""Where a model's parts are, on this host or on the hub, and how its denoiser comes into the processes of a run."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import quantization
from ..memory.planning import specs
from ..processes import is_sharded

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
# A weights file of diffusers or transformers, whole or a shard, with its variant.
_FILE = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(\w+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


def loaded_in(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`from_pretrained`'s argument for the dtype of weights, which newer diffusers call otherwise."""
    from diffusers.pipelines import pipeline_utils

    return {"dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype": dtype}


def variant_of(*folders: Path) -> dict[str, str]:
    """`from_pretrained`'s argument for folders whose weights are there in one variant only (fp16), and says so.

    Raises:
        ValueError: in several.
    """
    found: set[str | None] = set()
    for folder in folders:
        files = [_FILE.fullmatch(file.name) for file in folder.iterdir()] if folder.is_dir() else []
        variants = {match[1] for match in files if match}
        found |= {None} if None in variants else variants
    only = sorted(name for name in found if name is not None)
    if not only:
        return {}
    if len(only) > 1:
        raise ValueError(f"{folders[0]}: got weights in the variants {only}, want one of them, or plain ones")
    print(f"{', '.join(folder.name for folder in folders)}: weights of the variant {only[0]}", flush=True)
    return {"variant": only[0]}


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
    """The local folder with a denoiser's configuration and weights, or its file; downloaded where it is not there yet.

    Args:
        path: a folder or a name on the hub that has them directly, or in the subfolder `part`; or a safetensors file
            of the weights alone, which is given back.
        part: "transformer" or "unet".

    Raises:
        ValueError: neither, or the hub cannot be reached.
    """
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".safetensors":
        return folder
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


def load_parts(cls: Any, folder: Path, wanted: Iterable[str], dtype: torch.dtype, **more: Any) -> Any:
    """A pipeline with some of its parts, on the host.

    Args:
        cls: of diffusers.
        folder: a diffusers folder.
        wanted: names of parts, which may lack there.
        dtype: of their weights.
        more: arguments of `from_pretrained`, such as parts that are there.
    """
    wanted = tuple(wanted)
    parts = {name for name, value in cls.load_config(folder).items() if isinstance(value, (list, tuple))}
    absent = dict.fromkeys(parts - set(wanted))
    options = loaded_in(dtype) | variant_of(*(folder / part for part in wanted))
    return cls.from_pretrained(folder, **options, **absent | more)


def load_encoders(
    load: Callable[..., Any], names: Sequence[str], dtype: torch.dtype, kind: str | None, device: torch.device
) -> Any:
    """A pipeline with its text parts, on the device.

    Args:
        load: makes it on the host, from more arguments of `from_pretrained`.
        names: of its text encoders.
        dtype: of their weights.
        kind: `model.text_encoder_quantization`.
        device: that encodes.

    Raises:
        ValueError: bitsandbytes is not installed, or cannot be used on this machine.
    """
    if kind not in quantization.BITSANDBYTES:
        pipeline = load()
        if kind == "fp8":
            for name in names:
                quantization.store_encoder_in_fp8(getattr(pipeline, name), dtype)
        return pipeline.to(device)
    try:
        pipeline = load(**quantization.loading_encoders(kind, names, dtype))
    except (ImportError, RuntimeError) as error:
        raise ValueError(f'model.text_encoder_quantization: got "{kind}" on {device}, {error}') from error
    for name in names:
        # A pipeline leaves those in 4 bits where they were loaded.
        getattr(pipeline, name).to(device)
    return pipeline


def load_denoiser(
    cls: Any, path: Path, config: Path, dtype: torch.dtype, device: torch.device, **more: Any
) -> nn.Module:
    """A denoiser on the device; where it is split, in the main process's host memory and without weights elsewhere.

    `Processes.prepare` then hands the weights out, so that no host holds them twice and no device holds all.

    Args:
        cls: of diffusers.
        path: the folder of its configuration and weights, or a file with its weights, named as diffusers or as the
            original project names them.
        config: the folder of its configuration.
        dtype: of the weights.
        device: of this process.
        more: arguments of `from_pretrained`.

    Raises:
        ValueError: a file with other weights.
    """
    from accelerate import PartialState, init_empty_weights

    if is_sharded() and not PartialState().is_main_process:
        with init_empty_weights(include_buffers=False):
            empty = cls.from_config(cls.load_config(config))
        return specs.cast(empty, dtype, tuple(cls._keep_in_fp32_modules or ())).eval()
    options = loaded_in(dtype) | more
    if path.is_file():
        loaded = _from_file(cls, path, config, options)
    else:
        loaded = cls.from_pretrained(path, **options, **variant_of(path))
    return (loaded if is_sharded() else loaded.to(device)).eval()  # type: ignore[no-any-return]  # untyped


def _from_file(cls: Any, file: Path, config: Path, options: dict[str, Any]) -> Any:
    if not hasattr(cls, "from_single_file"):
        raise ValueError(
            f"model.denoiser: got the file {file}, want a folder: diffusers reads no files of {cls.__name__}"
        )
    try:
        loaded = cls.from_single_file(str(file), config=str(config), local_files_only=True, **options)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"model.denoiser: got {file}, want weights of {cls.__name__} as in {config}: {error}"
        ) from error
    if lost := [name for name, value in loaded.named_parameters() if value.is_meta]:
        raise ValueError(
            f"model.denoiser: got {file}, want weights of {cls.__name__}; {len(lost)} lack, {lost[0]} for one"
        )
    return loaded
