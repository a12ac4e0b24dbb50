"""What the planner says of a recipe and its loaded model."""

from dataclasses import replace
from typing import Any

from dancegrpo_fast.memory.planning.settings import GIB
from dancegrpo_fast.models import setup
from dancegrpo_fast.models.base import DiffusersModel
from dancegrpo_fast.recipe import Recipe

from .checks_more import CPU


def pieces(recipe: Recipe, model: DiffusersModel) -> Any:
    """The planner's, for this recipe."""
    given = replace(recipe, model=replace(recipe.model, memory_gib=1.0))
    return setup._iteration(model, given, CPU, text_tokens=3)


def least_gib(iteration: Any, size: int) -> float:
    """Of a device that holds so many bytes with its margins, a part of which grows with the device."""
    margins = []
    for gib in (1.0, 2.0):
        iteration.settings = replace(iteration.settings, gpu_gib=gib)
        margins.append(sum(iteration.margins().values()) / GIB)
    growth = margins[1] - margins[0]
    return (size / GIB + margins[0] - growth) / (1 - growth)
