from collections.abc import Iterator
from pathlib import Path

import pytest

from . import tiny


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision per process; every test is its own run."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_flux(tmp_path_factory.mktemp("flux") / "base")


@pytest.fixture(scope="session")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_diffusion(tmp_path_factory.mktemp("diffusion") / "base")


@pytest.fixture(params=["flux", "diffusion"])
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder
