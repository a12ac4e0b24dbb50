"""Weights to start from or to score: LoRA files of any writer, whole denoisers, checkpoints of a run."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import lora
from ..experts import SECOND, named, trained
from ..recipe import LoraSettings
from ..run import checkpoint
from .loading import CONFIG

if TYPE_CHECKING:
    from .base import DiffusersModel

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG, DIFFUSERS_METADATA = "adapter_config.json", "lora_adapter_metadata"
# In names of tensors, of adapters that are no LoRA.
OTHER_ADAPTERS = ("dora_scale", "lora_magnitude_vector", "hada_w", "lokr_", "oft_", "glora")


@dataclass(frozen=True)
class Source:
    """Where weights lie.

    Attributes:
        path: a folder of a checkpoint or of a denoiser, or a safetensors file.
        kind: what they are: a run's checkpoint, a denoiser, or LoRA layers alone.
    """

    path: Path
    kind: Literal["checkpoint", "denoiser", "lora"]

    @property
    def of_second(self) -> Path:
        """Where a denoiser or a LoRA file for the second of two denoisers is, beside the first's."""
        if self.kind == "denoiser":
            return self.path.with_name(SECOND)
        return self.path.parent / SECOND / self.path.name

    def files(self) -> list[Path]:
        """All that is read, for whoever compares."""
        if self.path.is_file():
            beside = [self.path.with_name(PEFT_CONFIG), self.of_second] if self.kind == "lora" else []
            return [self.path, *(file for file in beside if file.is_file())]
        return sorted(file for file in self.path.rglob("*") if file.is_file())


@dataclass(frozen=True)
class Adapter:
    """LoRA layers as diffusers' `load_lora_adapter` takes them, names after the denoiser's part.

    Attributes:
        source: the file or folder, for messages.
        tensors: `<part>.<module>.lora_A.weight` and `lora_B`, or in another way that diffusers converts.
        alphas: by `<part>.<module>.alpha`; of these, or of `config`, one is empty.
        config: peft's, where the file has it.
        passed_over: names of tensors that are of no denoiser.
    """

    source: Path
    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, float]
    config: Mapping[str, Any]
    passed_over: tuple[str, ...] = ()


def find_source(given: str, part: str, name: str) -> Source:
    """What lies at a path.

    Args:
        given: a run's folder (its newest checkpoint), a checkpoint, a folder with a denoiser in it or in its `part`, a
            folder with one LoRA file, or a safetensors file.
        part: "transformer" or "unet".
        name: of the argument, for messages.

    Raises:
        ValueError: none of these.
    """
    path = Path(given)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{name}: got {path}, want .safetensors")
        return Source(path, "lora" if any("lora" in key for key in _names(path, name)) else "denoiser")
    if not path.is_dir():
        raise ValueError(f"{name}: got {path}, which does not exist, want a file or folder on this machine")
    if found := checkpoint.complete(path / "checkpoints"):
        return Source(found[-1], "checkpoint")
    if (path / "state.json").is_file():
        return Source(path, "checkpoint")
    for where in (path / part, path):
        if (where / CONFIG).is_file():
            return Source(where, "denoiser")
    files = sorted(path.glob("*.safetensors"))
    chosen = [path / file for file in LORA_FILES if (path / file).is_file()] or files
    if len(chosen) != 1:
        nothing = "a run without a checkpoint yet" if (path / "recipe.json").is_file() else "no safetensors file"
        held = ", ".join(file.name for file in files) or nothing
        raise ValueError(
            f"{name}: got {path}, which holds {held}; want a run's folder, a checkpoint, {part}/ with {CONFIG}, or one "
            "LoRA file"
        )
    return find_source(str(chosen[0]), part, name)


def _names(file: Path, name: str) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name}: got {file}, want a safetensors file: {error}") from error


def read_adapter(file: Path, denoiser: nn.Module, part: str, pipeline: Any) -> Adapter:
    """LoRA layers of a file: with diffusers' names, peft's, or those that the pipeline's converters know (kohya's).

    Args:
        file: `.safetensors`; peft's `adapter_config.json` is read beside it.
        denoiser: that they are for.
        part: "transformer" or "unet".
        pipeline: the family's class in diffusers.

    Raises:
        ValueError: adapters of another kind, or names that the pipeline does not convert.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
        config = json.loads((opened.metadata() or {}).get(DIFFUSERS_METADATA, "{}"))
    if other := [name for name in tensors if any(kind in name for kind in OTHER_ADAPTERS)]:
        raise ValueError(f"{file}: got {other[0]}, want LoRA without DoRA, LoHa, LoKr or OFT")
    if not config and (beside := file.with_name(PEFT_CONFIG)).is_file():
        config = _peft_config(beside)
    # Unprefixed, as peft and `save_lora_adapter` write them; other names are left to diffusers.
    modules = {name for name, _ in denoiser.named_modules()}
    own = {name: lora.plain_name(name) for name in tensors}
    tensors = {
        f"{part}.{own[name]}" if own[name].partition(".lora_")[0] in modules else name: value
        for name, value in tensors.items()
    }
    config = {
        name if name.startswith((f"{part}.", "text_encoder")) else f"{part}.{name}": v for name, v in config.items()
    }
    tensors, alphas, passed_over = _converted(file, tensors, denoiser, part, pipeline)
    return Adapter(file, tensors, alphas, {} if alphas else config, passed_over)


def _peft_config(file: Path) -> dict[str, Any]:
    from peft import LoraConfig, PeftConfig

    found = PeftConfig.from_pretrained(file.parent)
    if not isinstance(found, LoraConfig) or found.use_dora or found.bias != "none":
        raise ValueError(f"{file}: got {found.peft_type} with bias {getattr(found, 'bias', None)}, want plain LoRA")
    return {name: value for name, value in found.to_dict().items() if value is not None}


def _converted(
    file: Path, tensors: dict[str, Tensor], denoiser: Any, part: str, pipeline: Any
) -> tuple[dict[str, Tensor], dict[str, float], tuple[str, ...]]:
    """The denoiser's tensors with diffusers' names, their alphas, and the names of the others."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    told = {"unet_config": denoiser.config} if part == "unet" else {}
    # Beside layers with peft's names some converters drop them, and some take them for kohya's.
    beside = {n: v for n, v in tensors.items() if n.endswith(".alpha") and f"{n[:-6]}.lora_A.weight" in tensors}
    tensors = {name: value for name, value in tensors.items() if name not in beside}
    # FLUX's tell others if they are asked to.
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        told["return_alphas"] = True
    try:
        found = pipeline.lora_state_dict(tensors, **told)
    except (ValueError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{file}: got LoRA layers that {pipeline.__name__} cannot read: {error!r}") from error
    converted, alphas = found if isinstance(found, tuple) else (found, None)
    alphas = beside | dict(alphas or {})
    for name in [name for name in converted if name.endswith(".alpha")]:
        alphas[name] = converted.pop(name)
    mine = {name: value for name, value in converted.items() if name.startswith(f"{part}.")}
    others = tuple(name for name in converted if name not in mine)
    if foreign := [name for name in others if not name.startswith("text_encoder")]:
        raise ValueError(f"{file}: got {foreign[0]}, want names of {part} or of text encoders")
    if not mine:
        raise ValueError(f"{file}: got LoRA layers of text encoders alone, want some of {part}")
    if not any("lora_A" in name for name in mine):
        mine = convert_unet_state_dict_to_peft(mine)
        # Left as they are, attention's are looked for under another name, and not found.
        alphas = convert_unet_state_dict_to_peft({name.removesuffix(".alpha"): v for name, v in alphas.items()})
        alphas = {f"{name.partition('.lora_')[0]}.alpha": value for name, value in alphas.items()}
    if alphas:
        # A layer without one has the scale 1.
        ranks = {f"{name.partition('.lora_')[0]}.alpha": len(value) for name, value in mine.items() if "lora_A" in name}
        alphas = {name: float(alphas.get(name, rank)) for name, rank in ranks.items()}
    return mine, alphas, others


def read_checkpoint(folder: Path, weights: str | None, parts: Sequence[str]) -> tuple[Adapter | dict[str, Tensor], str]:
    """The trained weights of a checkpoint, LoRA layers or all parameters by name; and which these are.

    Args:
        folder: of the checkpoint.
        weights: "model", or "ema" of one that holds an average; None: the average where there is one.
        parts: "transformer" or "unet", or the names of several denoisers.

    Raises:
        ValueError: it is damaged, or lacks these weights.
    """
    groups, state = checkpoint.stored(folder)
    weights = weights or ("ema" if "ema" in groups else "model")
    if weights not in groups:
        raise ValueError(f'weights: got "{weights}", want one of {sorted(groups.keys() & {"model", "ema"})}')
    tensors = {name: value[...] for name, value in groups[weights].items()}
    settings = state["recipe"]["model"]["lora"]
    if settings is None:
        return tensors, weights
    config = {"r": settings["rank"], "lora_alpha": settings["alpha"], "target_modules": settings["target_modules"]}
    # Of several denoisers the names already begin with the part.
    prefix = f"{parts[0]}." if len(parts) == 1 else ""
    layers = {f"{prefix}{lora.plain_name(name)}": value for name, value in tensors.items()}
    return Adapter(folder, layers, {}, {f"{part}.{name}": v for part in parts for name, v in config.items()}), weights


def read_weights(
    model: "DiffusersModel", source: Source, weights: str | None = "model"
) -> tuple[Adapter | Mapping[str, Tensor], str]:
    """LoRA layers for the model's denoiser, or whole parameters by name; and of a checkpoint, `weights` or which."""
    import diffusers

    first = model.denoiser_part
    denoisers = named(model.denoiser, first)
    if source.kind == "checkpoint":
        return read_checkpoint(source.path, weights, list(denoisers))
    files = {part: source.path if part == first else source.of_second for part in denoisers}
    needed = dict(list(files.items())[: len(trained(model.denoiser))])
    if lost := [file for file in needed.values() if not file.exists()]:
        raise ValueError(f"{source.path}: got nothing in {lost[0]}, want what is for {SECOND} there")
    files = {part: file for part, file in files.items() if file.exists()}
    if source.kind == "lora":
        pipeline = getattr(diffusers, model.pipeline)
        # Both are under the first's name.
        read = {part: read_adapter(file, denoisers[part], first, pipeline) for part, file in files.items()}
        return _joined(read, first), "model"
    prefix = "" if len(denoisers) == 1 else "{}."
    states = {prefix.format(part): model.load_from(file, second=part == SECOND) for part, file in files.items()}
    return {f"{start}{name}": v for start, one in states.items() for name, v in one.state_dict().items()}, "model"


def _joined(read: Mapping[str, Adapter], first: str) -> Adapter:
    """Those of several denoisers, each under its own name in place of the first's."""

    def of(values: Mapping[str, Any], part: str) -> dict[str, Any]:
        return {
            f"{part}.{n.removeprefix(f'{first}.')}" if n.startswith(f"{first}.") else n: v for n, v in values.items()
        }

    source, passed_over = read[first].source, tuple(name for one in read.values() for name in one.passed_over)
    tensors, alphas, config = (
        {name: value for part, one in read.items() for name, value in of(getattr(one, field), part).items()}
        for field in ("tensors", "alphas", "config")
    )
    return Adapter(source, tensors, alphas, config, passed_over)


def start_with(model: "DiffusersModel") -> bool:
    """Puts what `model.start_from` names into the loaded denoiser; whether LoRA layers to train came with it.

    Raises:
        ValueError: weights of another model, or LoRA layers other than `model.lora` says, which are not to be merged.
    """
    settings, start = model.settings, model.start
    merged = settings.start_as == "merged"
    if start is None:
        return False
    # A whole denoiser is what was loaded.
    found = None if start.kind == "denoiser" else read_weights(model, start)[0]
    if not isinstance(found, Adapter):
        if merged:
            raise ValueError(f'model.start_as: got "merged" of all weights in {settings.start_from}, want "adapter"')
        if found is not None:
            copy_parameters(model.denoiser, found, start.path)
        return False
    if found.passed_over:
        names = f"{len(found.passed_over)} tensors ({found.passed_over[0]}, ...)"
        print(f"{start.path}: {names} are of text encoders, which are not trained here: passed over", flush=True)
    if start.kind == "checkpoint" and (below := _merged_below(start.path)) is not None:
        raise ValueError(
            f"model.start_from: got LoRA layers of {start.path} on a base with {below} merged, want that base"
        )
    if merged:
        merge_adapter(model.denoiser, found, model.denoiser_part)
        return False
    if settings.lora is None:
        raise ValueError(f'model.lora: got null, want that of {start.path}, or model.start_as "merged"')
    if settings.second_expert == "frozen" and any(name.startswith(f"{SECOND}.") for name in found.tensors):
        raise ValueError(
            f'model.second_expert: got "frozen" with LoRA layers for {SECOND} in {start.path}, want "trained", or '
            'model.start_as "merged"'
        )
    add_adapter(model.denoiser, found, model.denoiser_part)
    check_adapter(model.denoiser, settings.lora, start.path, ', or model.start_as "merged"')
    return True


def _merged_below(folder: Path) -> str | None:
    """What was merged into the base of a checkpoint's LoRA layers."""
    settings = checkpoint.load_state(folder)["recipe"]["model"]
    return settings["start_from"] if settings.get("start_as") == "merged" else None


def add_adapter(denoiser: nn.Module, adapter: Adapter, part: str) -> None:
    """Freezes the denoiser and puts the LoRA layers into it, in float32, as those that are trained.

    Raises:
        ValueError: they are of another model.
    """
    denoisers, parts = named(denoiser, part), {name.partition(".")[0] for name in adapter.tensors}
    if other := sorted(parts - denoisers.keys()):
        raise ValueError(f"{adapter.source}: got LoRA layers of {other[0]}, want those of {', '.join(denoisers)}")
    for name, one in denoisers.items():
        one.requires_grad_(False)
        if name in parts:
            own = {key: value for key, value in adapter.tensors.items() if key.startswith(f"{name}.")}
            _add_adapter(one, replace(adapter, tensors=own), name)


def _add_adapter(denoiser: Any, adapter: Adapter, part: str) -> None:
    given: dict[str, Any] = (
        {"metadata": dict(adapter.config)} if adapter.config else {"network_alphas": dict(adapter.alphas)}
    )
    # Without weights, as in other processes than the main one, there is nothing to copy into.
    given["low_cpu_mem_usage"] = next(denoiser.parameters()).is_meta
    try:
        denoiser.load_lora_adapter(dict(adapter.tensors), prefix=part, adapter_name=lora.ADAPTER, **given)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{adapter.source}: got LoRA layers that do not fit the denoiser: {error}") from error
    wanted = {name.removeprefix(f"{part}.").partition(".lora_")[0] for name in adapter.tensors}
    if lost := sorted(wanted - lora.layers(denoiser).keys()):
        raise ValueError(f"{adapter.source}: got LoRA layers of {lost[0]}, want modules of the denoiser")
    lora.trained_in_float32(denoiser)
    # Loading rounds them to the base's dtype.
    for name, layer in lora.layers(denoiser).items():
        for side in ("lora_A", "lora_B"):
            getattr(layer, side)[lora.ADAPTER].weight.data.copy_(adapter.tensors[f"{part}.{name}.{side}.weight"])


def check_adapter(denoiser: nn.Module, settings: LoraSettings, source: Path, hint: str = "") -> None:
    """Raises ValueError where the denoiser's LoRA layers, which came from `source`, are not those of the settings."""
    for one in trained(denoiser):
        _check_adapter(one, settings, source, hint)


def _check_adapter(denoiser: nn.Module, settings: LoraSettings, source: Path, hint: str) -> None:
    found = lora.layers(denoiser)
    for name, layer in found.items():
        rank, alpha = layer.r[lora.ADAPTER], layer.scaling[lora.ADAPTER] * layer.r[lora.ADAPTER]
        for field, ours, theirs in (("rank", settings.rank, rank), ("alpha", settings.alpha, alpha)):
            if ours != theirs:
                raise ValueError(
                    f"model.lora.{field}: got {ours}, want {theirs:g}, which {source} has for {name}{hint}"
                )
    targeted = lora.targeted(denoiser, settings.target_modules)
    if other := sorted(targeted.symmetric_difference(found)):
        has = "has" if other[0] in found else "lacks"
        raise ValueError(
            f"model.lora.target_modules: got {settings.target_modules}, want {lora.endings(found)}, as {source} {has} "
            f"{other[0]}{hint}"
        )


def merge_adapter(denoiser: Any, adapter: Adapter, part: str) -> None:
    """Adds the LoRA layers' products to the weights, in the weights' precision, and leaves no layer."""
    if next(denoiser.parameters()).is_meta:
        return
    add_adapter(denoiser, adapter, part)
    for one in lora.adapted(denoiser):
        one.fuse_lora(safe_fusing=True)
        one.unload_lora()
    for kept in trained(denoiser):
        kept.requires_grad_(True)


def copy_parameters(denoiser: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raises ValueError for tensors that the denoiser lacks."""
    own = denoiser.state_dict()
    wrong = [name for name, value in tensors.items() if name not in own or own[name].shape != value.shape]
    if wrong or not tensors:
        raise ValueError(f"checkpoint: {source} holds {wrong[0] if wrong else 'nothing'}, which this model lacks")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
