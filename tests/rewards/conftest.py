from collections.abc import Iterator
from pathlib import Path

import pytest

from .judge_server import Server
from .tiny_clip import save_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CLIP."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.close()
