"""Makes many traces in one process as quick as one."""

from collections.abc import Iterator

import pytest

from dancegrpo_fast.memory.trace.tracer import collected


@pytest.fixture(scope="module")
def collected_once() -> Iterator[None]:
    """All that was imported is looked through once, and not before each of a module's traces."""
    with collected():
        yield
