"""What only a release needs, and whoever touches that part: `make test-all`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def release_but(stays: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """All values of one parameter, of which `make test` takes those in `stays` and leaves the others out."""
    return [one if one in stays else pytest.param(one, marks=pytest.mark.release) for one in values]
