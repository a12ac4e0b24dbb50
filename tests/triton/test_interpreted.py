"""The Triton kernels in Triton's interpreter, in processes of their own: the switch is read at import."""

from pathlib import Path

import pytest

from ..processes import pytest_elsewhere

pytest.importorskip("triton")
FILES = sorted(str(path) for path in Path(__file__).parent.glob("interpreted_*.py"))
# Two processes of about the same length: each one imports torch and Triton first.
HALVES = {"the last three": FILES[-3:], "the others": FILES[:-3]}


@pytest.mark.long
@pytest.mark.parametrize("half", HALVES)
def test_interpreted(half: str, pytestconfig: pytest.Config) -> None:
    pytest_elsewhere(pytestconfig, HALVES[half], TRITON_INTERPRET="1")
