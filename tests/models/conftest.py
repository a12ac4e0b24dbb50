from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .folders import BUILDERS


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps one state per process; every test is its own run."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, made when first asked for."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = BUILDERS[family](tmp_path_factory.mktemp(family) / "base")
        return made[family]

    return build
