from pathlib import Path

import pytest

from .tiny_clip import save_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CLIP."""
    return save_clip(tmp_path_factory.mktemp("clip"))
