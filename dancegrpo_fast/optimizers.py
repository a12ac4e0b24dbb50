"""Optimisers by name: what a recipe may ask of them, and what they keep of a trained tensor."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .install import missing
from .recipe import TrainSettings

ADAMW, EIGHT_BIT = "adamw", "adamw8bit"
BY_NAME = {ADAMW: "torch.optim:AdamW", EIGHT_BIT: "bitsandbytes.optim:AdamW8bit"}
PROBE = (4, 8)  # shape of the tensor that an optimiser is tried on
FAILURES = (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, KeyError, NotImplementedError)


@dataclass
class Kept:
    """What an optimiser keeps of each tensor.

    Attributes:
        bytes_per_number: of states of as many numbers as the tensor; others are small.
        others: names of states of another shape, which cannot be split as the tensor is.
        numbers: Python's numbers among the states, and their types.
        names: of all states; None where that is not known.
    """

    bytes_per_number: float = 0.0
    others: list[str] = field(default_factory=list)
    numbers: dict[str, type] = field(default_factory=dict)
    names: set[str] | None = None


# bitsandbytes steps on a GPU only: a byte each of two states, with two float32 scales for 256 of them.
KEPT_IN_8_BIT = Kept(2 + 8 / 256, ["state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"], {"step": int})


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class that `train.optimizer` names.

    Raises:
        ValueError: it does not import, or is no optimiser.
    """
    module, _, attribute = BY_NAME.get(name, name).partition(":")
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f'train.optimizer: got "{name}", which does not import: {missing(error)}') from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f'train.optimizer: got "{name}", want a torch.optim.Optimizer')
    if callable(getattr(found, "eval", None)):
        raise ValueError(f'train.optimizer: got "{name}", which has other weights for sampling, want one that has not')
    return found


def make_optimizer(train: TrainSettings, parameters: Iterable[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    """The optimiser of a recipe on these parameters.

    Args:
        train: its settings.
        parameters: that it steps.
        more: arguments that a recipe does not know.

    Raises:
        ValueError: no such optimiser, or arguments or parameters that it does not take.
    """
    kind = find_optimizer(train.optimizer)
    given: dict[str, Any] = {"lr": train.learning_rate}
    taken = inspect.signature(kind).parameters
    anything = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    if "lr" not in taken:
        raise ValueError(f'train.optimizer: got "{train.optimizer}", which takes no lr, want one that does')
    if "weight_decay" in taken:
        given["weight_decay"] = train.weight_decay
    elif train.weight_decay:
        raise ValueError(
            f'train.weight_decay: got {train.weight_decay} for "{train.optimizer}", which takes none, want 0'
        )
    unknown = [name for name in train.optimizer_args if name not in taken and not anything]
    if unknown:
        known = ", ".join(name for name in taken if name not in ("params", "lr", "weight_decay"))
        raise ValueError(f'train.optimizer_args: got {unknown[0]} for "{train.optimizer}", want some of {known}')
    args = {name: tuple(v) if isinstance(v, list) else v for name, v in train.optimizer_args.items()}
    try:
        return kind(list(parameters), **given, **{**more, **args})
    except FAILURES as error:
        asked = f'"{train.optimizer}"' + (f" with {train.optimizer_args}" if args else "")
        raise ValueError(f"train.optimizer: got {asked}, which refuses: {error}") from error


def changed_settings(before: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimiser's steps changed of a parameter group, where some keep what they learn of all tensors."""
    return {
        name: value
        for name, value in group.items()
        if name not in ("params", "lr") and (isinstance(value, Tensor) or value is not before.get(name))
    }


def probe(train: TrainSettings, dtype: torch.dtype = torch.float32) -> Kept:
    """Tries the recipe's optimiser on a small tensor on the CPU: that it steps, and what it keeps.

    Args:
        train: its settings.
        dtype: of the tensor.

    Raises:
        ValueError: it cannot be made, does not step, or keeps what cannot be written into a checkpoint.
    """
    if train.optimizer == EIGHT_BIT:
        return KEPT_IN_8_BIT
    # No zeros, of which some keep less.
    parameter = nn.Parameter(torch.ones(PROBE, dtype=dtype))
    optimizer = make_optimizer(train, [parameter])
    before, parameter.grad = dict(optimizer.param_groups[0]), torch.ones(PROBE, dtype=dtype)
    try:
        optimizer.step()
    except FAILURES as error:
        raise ValueError(f'train.optimizer: got "{train.optimizer}", which does not step: {error}') from error
    state = optimizer.state.get(parameter, {})
    kept = Kept(names=set(state))
    for name, value in {**changed_settings(before, optimizer.param_groups[0]), **state}.items():
        if isinstance(value, (bool, int, float)):
            kept.numbers[name] = type(value)
        elif not isinstance(value, Tensor):
            raise ValueError(
                f'train.optimizer: got "{train.optimizer}", whose state {name} is {type(value).__name__}, want '
                "tensors and numbers, which a checkpoint can hold"
            )
        elif name in state and value.ndim > 0:
            if value.numel() >= parameter.numel():
                kept.bytes_per_number += value.itemsize
            if value.shape != PROBE:
                kept.others.append(name)
    return kept
