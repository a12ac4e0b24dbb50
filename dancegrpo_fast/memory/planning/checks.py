"""Checks of one setting each: a ValueError names it, what came and what is wanted."""

import math


def check_kind(name: str, value: object, kind: type, wanted: str) -> None:
    """A value of this kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: got {value!r}, want {wanted}")


def check_tuple(name: str, value: object, kind: type, wanted: str) -> None:
    """A tuple of values of this kind."""
    if not isinstance(value, tuple) or not all(isinstance(part, kind) for part in value):
        raise ValueError(f"{name}: got {value!r}, want a tuple of {wanted}")


def check_integer(name: str, value: object, low: int, more: str = "") -> None:
    """An integer of at least `low`; `more` says what else it may be."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: got {value!r}, want an integer of at least {low}{more}")


def check_number(name: str, value: object) -> None:
    """A finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]  # is a number
        raise ValueError(f"{name}: got {value!r}, want a finite number above 0")


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """One of the known words."""
    if value not in known:
        raise ValueError(f'{name}: got "{value}", want one of {", ".join(known)}')
