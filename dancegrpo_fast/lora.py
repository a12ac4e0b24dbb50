"""peft LoRA layers on a denoiser."""

from collections.abc import Sequence

from torch import nn


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
        denoiser: a diffusers model.
        rank: of the update matrices.
        alpha: its scale is `alpha / rank`.
        target_modules: endings of module names.

    Raises:
        ValueError: no module has such a name.
    """
    from peft import LoraConfig

    check_targets(denoiser, target_modules)
    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(target_modules))
    try:
        denoiser.add_adapter(config)  # type: ignore[operator]  # diffusers' PeftAdapterMixin
    except ValueError as error:
        raise ValueError(f"model.lora.target_modules: got {list(target_modules)}, {error}") from error
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
