"""Trained weights put into a model, and held to what their run recorded."""

from pathlib import Path
from typing import Any

from ..lora import adapted
from ..models.base import DiffusersModel
from ..models.weights import Adapter, Source, add_adapter, check_adapter, copy_parameters, find_source, read_weights
from ..run import checkpoint
from ..run.identity import START, model_identity


def load_weights(model: DiffusersModel, source: Path, weights: str | None = "model") -> str:
    """Puts trained weights into a model's denoiser and says which.

    Args:
        model: as the recipe makes it. Where that has LoRA, the weights must have its rank, alpha and modules; where it
            has none, LoRA layers come as they are.
        source: as `find_source` takes it. The base of a run's folder, a checkpoint or a saved model beside the run's
            checkpoints must be the model's; that of a file is not looked for.
        weights: "model", or "ema" of a checkpoint that holds an average; None: the average where there is one.

    Raises:
        ValueError: none of these, or weights of another model.
    """
    found = find_source(str(source), model.denoiser_part, "checkpoint")
    if weights not in (None, "model") and found.kind != "checkpoint":
        raise ValueError(f'weights: got "{weights}" of {source}, which is no checkpoint; want "model"')
    trained, taken = read_weights(model, found, weights)
    _check_base(model, source, found, whole=not isinstance(trained, Adapter))
    if isinstance(trained, Adapter):
        for one in adapted(model.denoiser):
            one.delete_adapters(list(one.peft_config))
        add_adapter(model.denoiser, trained, model.denoiser_part)
        if model.settings.lora is not None:
            check_adapter(model.denoiser, model.settings.lora, found.path)
        model.denoiser.requires_grad_(False)
    else:
        copy_parameters(model.denoiser, trained, found.path)
    if found.kind != "checkpoint":
        return str(found.path)
    return f"iteration {checkpoint.load_state(found.path)['iteration']} ({found.path}, {taken})"


def _check_base(model: DiffusersModel, source: Path, found: Source, whole: bool) -> None:
    """Raises ValueError where the run that left the weights recorded another base than the model has."""
    beside = checkpoint.complete(source.parent / "checkpoints") if source.is_dir() else []
    recorded = found.path if found.kind == "checkpoint" else beside[-1] if beside else None
    if recorded is None:
        return
    state = checkpoint.load_state(recorded)
    settings: dict[str, Any] = (state.get("recipe") or {}).get("model") or {}
    then: dict[str, str] = (state.get("model") or {}).get("files") or {}
    now: dict[str, str] = model_identity(model)["files"]
    # All weights of a denoiser stand for what they began with, too.
    replaced = ("prompt_embeds/", *((*(f"{part}/" for part in model.denoiser_paths), f"{START}/") if whole else ()))
    for name in dict.fromkeys([*now, *then]):
        if now.get(name) == then.get(name) or name.startswith(replaced):
            continue
        if (began := settings.get("start_from")) != model.settings.start_from:
            raise ValueError(
                f"model.start_from: got {model.settings.start_from}, want {began} with model.start_as "
                f"{settings.get('start_as')}, as the run of {source} had"
            )
        raise ValueError(
            f"checkpoint: got {source}, whose run had another {name} than model.path {model.settings.path}, want "
            "its own base (a saved LoRA file, given itself, is taken on any)"
        )
