"""Each engine as a double and, where `DGF_PEERS` names a folder of checkouts, as its own sources."""

import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

from . import engines


def _plugin(name: str, kinds: Sequence[str] | None, *packages: str) -> Any:
    """A fixture: the plug-in, imported with its engine at hand; None: with a double of that."""

    @pytest.fixture(params=kinds)
    def plugin(request: Any) -> Iterator[ModuleType]:
        with engines.fresh(name, *packages):
            getattr(engines, name)(getattr(request, "param", "double"))
            yield importlib.import_module(f"dancegrpo_fast.plugins.{name}")

    return plugin


flow_factory, small_flow_factory = _plugin("flow_factory", ("newest", *engines.KINDS)), _plugin("flow_factory", None)
verl_omni, small_verl_omni = _plugin("verl_omni", engines.KINDS, "verl", "tensordict"), _plugin("verl_omni", None)
unirl = _plugin("unirl", engines.KINDS)
