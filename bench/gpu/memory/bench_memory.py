"""The planner's predictions held to a GPU, in the order of their worth: time may run out.

In training, a call of real blocks at real width; untiled decodes; and which attention takes a mask. Each case is a row.
A dry run has small models on the CPU.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from bench.place import Place, place_of
from bench.rows import Row

from . import kernels, models, vaes

ATTENTION_SECONDS = 3.0


def _attention(names: Iterable[str], masks: Iterable[bool]) -> Iterator[Any]:
    for name in names:
        for masked in masks:
            label = f"attention memory, {name}, {'mask' if masked else 'no mask'}"
            yield _case(label, ATTENTION_SECONDS, partial(kernels.row, name, masked))


def _case(label: str, seconds: float, run: Callable[[torch.device], Row]) -> Any:
    return pytest.param(run, marks=pytest.mark.takes(seconds), id=label)


def _models(cases: Iterable[models.Case]) -> Iterator[Any]:
    for case in cases:
        yield _case(case.label, case.seconds, partial(models.row, case))


CASES = (
    *_attention(kernels.MASKED, (True,)),
    *_models(models.FIRST),
    *(_case(case.label, case.seconds, partial(vaes.row, case)) for case in vaes.CASES),
    *_models(models.LATER),
    *_attention((name for name in kernels.BACKENDS if name not in kernels.MASKED), (False, True)),
    *_attention(kernels.MASKED, (False,)),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On a CPU `bench.memory` has such rows."""
    place = place_of(metafunc.config.getoption("--device"))
    none = pytest.param(None, marks=pytest.mark.skip(reason="GPU memory is measured on a GPU"), id="none")
    metafunc.parametrize("run", CASES if place.gpu else [none])


def test_memory(run: Callable[[torch.device], Row], place: Place, keep: Callable[[Row], None]) -> None:
    """One row."""
    keep(run(place.device))
