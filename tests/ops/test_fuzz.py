"""Seeded calls of every op, right within the budget or refused by the name of what is wrong with them.

A number is a call: `pytest "tests/ops/test_fuzz.py::test_call[1234]"` runs one alone.
"""

import re

import pytest

from ..release import release_but
from . import fuzz_blocks, fuzz_host
from .fuzz_draws import Call, Draw, shown
from .fuzz_policy import loss_call, spoiled_loss_call
from .fuzz_transition import noise_call, score_call, step_call

CALLS, QUICK = 2000, 400
KINDS = (
    step_call,
    score_call,
    noise_call,
    loss_call,
    loss_call,
    spoiled_loss_call,
    *fuzz_blocks.KINDS,
    *fuzz_host.KINDS,
)


@pytest.mark.parametrize("number", release_but(range(QUICK), range(CALLS)))
def test_call(number: int) -> None:
    draw = Draw(number)
    call: Call = KINDS[number % len(KINDS)](draw)
    if not call.refused or (call.check is not None and draw.maybe(0.4)):
        call.check(call.run())
        return
    name = draw.of(*call.refused)
    call.arguments[name] = value = draw.of(*call.refused[name])
    with pytest.raises((ValueError, TypeError)) as caught:
        call.run()
        pytest.fail(f"{name}={shown(value)} was taken by {call}")
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message), f"{name}={shown(value)}: {message}\n{call}"
