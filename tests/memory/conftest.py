"""One plan for many tests, and many traces in one process as quick as one."""

from collections.abc import Iterator

import pytest

from dancegrpo_fast.memory.planning.planner import Plan, plan
from dancegrpo_fast.memory.planning.rewards import REWARDS
from dancegrpo_fast.memory.planning.settings import Settings
from dancegrpo_fast.memory.trace.tracer import collected

from .small import FLUX


@pytest.fixture(scope="module")
def collected_once() -> Iterator[None]:
    """All that was imported is looked through once, and not before each of a module's traces."""
    with collected():
        yield


@pytest.fixture(scope="session")
def flux() -> Plan:
    """FLUX.1-dev with LoRA, all of its blocks computed again."""
    return plan(Settings(**FLUX, lora=16, checkpointing="full", rewards=(REWARDS["hps"],)), advise=False)
