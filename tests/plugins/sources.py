"""The engines' own sources where they can be had, and modules put under their names."""

import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PEERS = os.environ.get("DGF_PEERS")
KINDS = ("double", "real")


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__path__ = []  # type: ignore[attr-defined]  # a package
    vars(made).update(members)
    return made


def source(project: str, *parts: str) -> Path:
    """A file of a project's checkout, or the test is skipped."""
    if PEERS is None:
        pytest.skip("DGF_PEERS names no folder with checkouts of the projects")
    path = Path(PEERS, project, *parts)
    if not path.exists():
        pytest.skip(f"DGF_PEERS has no {path}")
    return path


def loaded(name: str, path: Path) -> ModuleType:
    """A module by its file, under a name, without the packages above it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def forget(*packages: str) -> None:
    for name in list(sys.modules):
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            del sys.modules[name]


@contextmanager
def fresh(*packages: str):
    """Without these packages and our plug-ins' modules, before and after."""
    names = (*packages, "dancegrpo_fast.plugins")
    forget(*names)
    yield
    forget(*names)
