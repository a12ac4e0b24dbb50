"""Checks of numbers, that name the field of the recipe."""


def positive(name: str, value: float) -> None:
    """Raises ValueError, which begins with `name`, for a value that is not above 0."""
    if not value > 0:
        raise ValueError(f"{name}: got {value}, want more than 0")


def at_least(name: str, value: float, low: float) -> None:
    """Raises ValueError, which begins with `name`, for a value below `low`."""
    if not value >= low:
        raise ValueError(f"{name}: got {value}, want at least {low:g}")
