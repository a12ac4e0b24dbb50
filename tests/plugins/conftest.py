"""Each engine as a double and, where `DGF_PEERS` names a folder of checkouts, as its own sources."""

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from . import engines


def _plugin(name: str, kind: str, *packages: str) -> Iterator[ModuleType]:
    with engines.fresh(name, *packages):
        getattr(engines, name)(kind)
        yield importlib.import_module(f"dancegrpo_fast.plugins.{name}")


@pytest.fixture(params=("newest", *engines.KINDS))
def flow_factory(request: Any) -> Iterator[ModuleType]:
    """The plug-in, with Flow-Factory at hand."""
    yield from _plugin("flow_factory", request.param)


@pytest.fixture
def small_flow_factory() -> Iterator[ModuleType]:
    """The plug-in, with a double of Flow-Factory."""
    yield from _plugin("flow_factory", "double")


@pytest.fixture(params=engines.KINDS)
def verl_omni(request: Any) -> Iterator[ModuleType]:
    """The plug-in, imported with verl-omni at hand."""
    yield from _plugin("verl_omni", request.param, "verl", "tensordict")


@pytest.fixture
def small_verl_omni() -> Iterator[ModuleType]:
    """The plug-in, imported with a double of verl-omni."""
    yield from _plugin("verl_omni", "double")


@pytest.fixture(params=engines.KINDS)
def unirl(request: Any) -> Iterator[ModuleType]:
    """The plug-in, with UniRL at hand."""
    yield from _plugin("unirl", request.param)
