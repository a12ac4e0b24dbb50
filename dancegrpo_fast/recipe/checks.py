"""Checks of settings, that name the field of the recipe."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..checks import shown

WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"}


def check_fields(section: str, settings: Any, paths: Sequence[str] = ()) -> None:
    """Holds every field of a dataclass to its annotation, and expands `~` and variables in those that are paths.

    Args:
        section: of the recipe, "" for its top.
        settings: a dataclass.
        paths: fields that are paths, which are replaced.

    Raises:
        ValueError: a value of another type or outside its choices, a number that is not finite, or a path with a
            variable that is not set.
    """
    prefix = f"{section}." if section else ""
    kinds = get_type_hints(type(settings))
    for field in fields(settings):
        value, kind = getattr(settings, field.name), kinds[field.name]
        if not _fits(value, kind):
            raise ValueError(f"{prefix}{field.name}: got {shown(value)}, want {_words(kind)}")
        if field.name in paths and value is not None:
            setattr(settings, field.name, expanded(f"{prefix}{field.name}", value))


def _fits(value: Any, kind: Any) -> bool:
    origin, of = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in of)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in of)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(one, *of or (Any,)) for one in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(of) and all(map(_fits, value, of))
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return origin is Any or isinstance(value, origin)


def _words(kind: Any) -> str:
    origin, of = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, of))
    if origin is Literal:
        return " or ".join(map(shown, of))
    if origin is tuple:
        return f"a list of {' and '.join(map(_words, of))}"
    if origin is list:
        return f"a list of {_words(of[0])}" if of else "a list"
    return WORDS.get(origin, "names with values" if origin is dict else origin.__name__)


def expanded(name: str, path: str, environment: Mapping[str, str] = os.environ) -> str:
    """A path with a leading `~`, `$VARIABLE` and `${VARIABLE}` replaced.

    Raises:
        ValueError: a variable is not set, or `~` is of a user without a home.
    """

    def value(found: re.Match[str]) -> str:
        variable = found[1] or found[2]
        if variable not in environment:
            raise ValueError(f'{name}: got "{path}" with ${variable}, want it set in the environment')
        return environment[variable]

    whole = os.path.expanduser(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, path))
    if whole.startswith("~"):
        raise ValueError(f'{name}: got "{path}", want ~ or the name of a user with a home behind it')
    return whole


def positive(name: str, value: float) -> None:
    """Raises ValueError, which begins with `name`, for a value that is not above 0."""
    if not value > 0:
        raise ValueError(f"{name}: got {value}, want more than 0")


def at_least(name: str, value: float, low: float) -> None:
    """Raises ValueError, which begins with `name`, for a value below `low`."""
    if not value >= low:
        raise ValueError(f"{name}: got {value}, want at least {low:g}")
