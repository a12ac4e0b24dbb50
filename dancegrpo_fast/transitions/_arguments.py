"""Checks shared by the samplers: each names the argument, what came and what is wanted."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def as_float64(name: str, values: Tensor | Sequence[float]) -> Tensor:
    column = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    if column.ndim != 1:
        raise ValueError(f"{name}: got shape {tuple(column.shape)}, want one dimension")
    if not bool(torch.isfinite(column).all()):
        raise ValueError(f"{name}: got {column.tolist()}, want finite numbers")
    return column


def check_level(name: str, value: float, high: float = math.inf) -> float:
    number = float(value)
    if not (0.0 <= number <= high) or math.isinf(number):
        bound = "a finite number of at least 0" if math.isinf(high) else f"a number from 0 to {high:g}"
        raise ValueError(f"{name}: got {value}, want {bound}")
    return number
