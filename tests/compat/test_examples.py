"""The examples in the modules' docstrings run."""

import doctest
import importlib

import pytest

from dancegrpo_fast import compat


@pytest.mark.parametrize("name", sorted(set(dir(compat)) - set(compat.__all__)))
def test_example(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"dancegrpo_fast.compat.{name}"))
    assert found.attempted > 0 and found.failed == 0
