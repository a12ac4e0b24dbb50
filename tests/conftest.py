"""What every test shares. The tests run against the installed package."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from .release import mark_release

# `bench` lies beside the package: its folder comes last, so that the installed package is the one tested.
sys.path.append(str(Path(__file__).parents[1]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_release(items)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True, scope="module")
def imported_set_aside() -> None:
    """What was imported before a module's tests is not looked through whenever garbage is collected in them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """One torch thread, so that test workers do not fight over cores; call it to set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Plans assume speeds, whatever `dancegrpo-fast rates` kept of this machine; the file that would say otherwise."""
    file = tmp_path / "cache" / "rates.json"
    monkeypatch.setattr("dancegrpo_fast.memory.planning.measured.path", lambda: file)
    return file


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision per process; every test is its own run."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .train import tiny

    return tiny.make_flux(tmp_path_factory.mktemp("flux") / "base")


@pytest.fixture(scope="session")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .train import tiny

    return tiny.make_diffusion(tmp_path_factory.mktemp("diffusion") / "base")


@pytest.fixture(params=["flux", "diffusion"])
def base(request: pytest.FixtureRequest) -> Path:
    """The folder of one paradigm's model after the other's."""
    folder: Path = request.getfixturevalue(request.param)
    return folder
