"""Every self check is a first one, and one that fails fails its test."""

import warnings
from collections.abc import Iterator

import pytest

from dancegrpo_fast.ops import selfcheck


@pytest.fixture
def nothing_known() -> Iterator[None]:
    selfcheck.clear()
    yield
    selfcheck.clear()


@pytest.fixture
def failures_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(eager torch|self check)")
        yield
