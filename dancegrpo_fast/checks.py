"""Checks of plain arguments: each names the argument, what came and what is wanted."""

import math
import numbers
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

LARGEST = sys.float_info.max
SMALLEST = math.ulp(0.0)
# Numbers of numpy and of graphs that are being compiled count too.
_WHOLE: tuple[Any, ...] = (int, torch.SymInt, numbers.Integral)
_NUMBERS: tuple[Any, ...] = (float, *_WHOLE, torch.SymFloat, numbers.Real)


def shown(value: Any) -> str:
    """An argument in few words, without a tensor's numbers."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" ({value.layout})"
        return f"a tensor of {value.dtype}{layout} and shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, torch.dtype)):
        return str(value)
    if isinstance(value, (tuple, list)):
        few = ", ".join(map(shown, value[:10]))
        return f"{type(value).__name__} ({few}{', ...' if len(value) > 10 else ''})"
    return f'"{value}"' if isinstance(value, str) else type(value).__name__


def check_number(
    name: str, value: Any, low: float = -LARGEST, high: float = LARGEST, wanted: str = "a finite number"
) -> float:
    """A real number from `low` to `high`, no bool and no tensor; returns it as a float."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, _NUMBERS) or not -LARGEST <= value <= LARGEST:
            raise ValueError(f"{name}: got {shown(value)}, want {wanted}")
        value = float(value)
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, want {wanted}")
    number: float = value
    return number


def check_int(name: str, value: Any, low: int, high: int | None = None, also: str = "") -> int:
    """A whole number from `low` to `high`, no bool and no tensor; returns it as an int."""
    known = isinstance(value, _WHOLE) and not isinstance(value, bool)
    if not known or value < low or (high is not None and value > high):
        between = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: got {shown(value)}, want an int {between}{also}")
    if type(value) is not int and not isinstance(value, torch.SymInt):
        value = int(value)
    number: int = value
    return number


def check_bool(name: str, value: Any) -> None:
    """True or False."""
    if value is not True and value is not False:
        raise ValueError(f"{name}: got {shown(value)}, want True or False")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """One of the words."""
    if not isinstance(value, str) or value not in choices:
        *most, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}: got {shown(value)}, want {', '.join(most)} or {last}")


def check_dtype(name: str, value: Any, choices: Collection[torch.dtype]) -> None:
    """One of the dtypes."""
    if not isinstance(value, torch.dtype) or value not in choices:
        raise ValueError(f"{name}: got {shown(value)}, want one of {', '.join(map(str, choices))}")


def as_float64(name: str, values: Any) -> Tensor:
    """A copy of finite numbers on the CPU, from a tensor, an array or a sequence."""
    try:
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: got {shown(values)}, want numbers") from None
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name}: got {found.tolist()}, want finite numbers")
    return found


def as_column(name: str, values: Any) -> Tensor:
    """`as_float64` of one dimension."""
    column = as_float64(name, values)
    if column.ndim != 1:
        raise ValueError(f"{name}: got shape {tuple(column.shape)}, want one dimension")
    return column


def check_level(name: str, value: Any, high: float = LARGEST) -> float:
    """A number from 0 to `high`."""
    wanted = "a finite number of at least 0" if high == LARGEST else f"a number from 0 to {high:g}"
    return check_number(name, value, 0.0, high, wanted)
