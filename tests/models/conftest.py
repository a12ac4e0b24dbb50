from collections.abc import Callable
from pathlib import Path

import pytest

from .folders import BUILDERS


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, made when first asked for."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = BUILDERS[family](tmp_path_factory.mktemp(family) / "base")
        return made[family]

    return build
