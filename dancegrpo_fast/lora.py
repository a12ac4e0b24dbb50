"""peft LoRA layers on a denoiser."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .experts import each, trained

ADAPTER = "default"  # peft's name of the layers that are trained
START = "start"  # of a frozen copy of them


def unmatched(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The targets in which no module's name ends."""
    names = [f".{name}" for name, _ in model.named_modules()]
    return [target for target in targets if not any(name.endswith(f".{target}") for name in names)]


def check_targets(denoiser: nn.Module, targets: Sequence[str]) -> None:
    """Raises ValueError where a target is the end of no module's name."""
    if lost := unmatched(denoiser, targets):
        raise ValueError(f"model.lora.target_modules: got {', '.join(lost)}, want endings of the denoiser's modules")


def add_lora(denoiser: nn.Module, rank: int, alpha: int, target_modules: Sequence[str]) -> None:
    """Freezes the denoiser and adds peft LoRA layers to the modules whose names end in one of `target_modules`.

    They are float32 whatever their modules are: peft casts a layer's input to float32 and its sum back, so that hidden
    states keep their dtype, and no step of the optimiser is rounded away.

    Args:
        denoiser: a diffusers model, or `Experts`, whose trained ones get them.
        rank: of the update matrices.
        alpha: its scale is `alpha / rank`.
        target_modules: endings of module names.

    Raises:
        ValueError: no module has such a name.
    """
    from peft import LoraConfig

    check_targets(denoiser, target_modules)
    for one in trained(denoiser):
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(target_modules))
        try:
            one.add_adapter(config)  # type: ignore[operator]  # diffusers' PeftAdapterMixin
        except ValueError as error:
            raise ValueError(f"model.lora.target_modules: got {list(target_modules)}, {error}") from error
        trained_in_float32(one)


def layers(denoiser: nn.Module) -> dict[str, Any]:
    """The modules with LoRA layers that are trained, by name."""
    from peft.tuners.lora import LoraLayer

    named = ((name, module) for name, module in denoiser.named_modules() if isinstance(module, LoraLayer))
    return {name: layer for name, layer in named if ADAPTER in layer.r}


def targeted(denoiser: nn.Module, target_modules: Sequence[str]) -> set[str]:
    """Names of the modules that `add_lora` gives layers."""
    endings = tuple(f".{target}" for target in target_modules)
    return {name for name, _ in denoiser.named_modules() if f".{name}".endswith(endings)}


def endings(names: Iterable[str]) -> list[str]:
    """The last parts of module names, as `target_modules` has them."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(part[-2:] if part[-1].isdigit() else part[-1:]) for part in parts})


def trained_in_float32(denoiser: nn.Module) -> None:
    """Freezes all but the LoRA layers, and has these in float32."""
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapted(denoiser: nn.Module) -> list[Any]:
    """Its denoisers that have LoRA layers."""
    return [one for one in each(denoiser) if getattr(one, "peft_config", None)]


def keep_start(denoiser: nn.Module) -> None:
    """Adds a frozen copy of the LoRA layers, which `set_adapter(START)` of each of `adapted` puts in their place."""
    for one in adapted(denoiser):
        with warnings.catch_warnings():
            # Two sets of layers are what is wanted here.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            one.add_adapter(copy.deepcopy(one.peft_config[ADAPTER]), START)
        for layer in layers(one).values():
            for part in (layer.lora_A, layer.lora_B):
                part[START] = copy.deepcopy(part[ADAPTER])
        one.set_adapter(ADAPTER)


def plain_name(name: str) -> str:
    """Of peft's names of tensors what diffusers has."""
    for layer in ("lora_A", "lora_B"):
        name = name.replace(f".{layer}.{ADAPTER}.", f".{layer}.")
    return name.removeprefix("base_model.model.")
