"""Runs functions of a script once more, so that it notices nothing."""

import contextlib
import copy
import io
import logging
import operator
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .settings import inside

# Far more than a trial takes. One that waits for what its caller holds, as for the import of a module, ends here.
_LIMIT = 60.0


def apart(work: Callable[[], None]) -> None:
    """Runs `work` on the CPU in a thread of its own.

    A new thread has no autocast, no inference mode, no default device, no modes and no hooks of the caller's. Random
    states, the default dtype, logging and warnings are the process's: they are put back. What is printed is lost.

    Raises:
        BaseException: what `work` raised.
        TimeoutError: it takes too long; it is left to itself.
    """
    raised: list[BaseException] = []

    def run() -> None:
        inside.on = True
        try:
            with _unchanged():
                work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="dancegrpo-fast", daemon=True)
    thread.start()
    thread.join(_LIMIT)
    if thread.is_alive():
        raise TimeoutError(f"it took longer than {_LIMIT:.0f} s")
    if raised:
        raise raised[0]


@contextlib.contextmanager
def _random_states(device: torch.device | None = None) -> Iterator[None]:
    """Puts back the states of torch's, Python's and numpy's random numbers, and of a GPU's."""
    numpy = sys.modules.get("numpy")
    drawn, python = torch.get_rng_state(), random.getstate()
    numbers = None if numpy is None else numpy.random.get_state()
    on_device = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
    try:
        yield
    finally:
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)  # type: ignore[arg-type]  # it is a GPU
        if numpy is not None:
            numpy.random.set_state(numbers)
        random.setstate(python)
        torch.set_rng_state(drawn)


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    dtype, disabled = torch.get_default_dtype(), logging.root.manager.disable
    silent = io.StringIO()
    with _random_states():
        try:
            torch.set_default_dtype(torch.float32)
            logging.disable(logging.CRITICAL)
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(disabled)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Runs a script's function once more in its own surroundings, with the random states put back.

    What watches the call, a checkpoint for one, does not see it.
    """
    before, inside.on = getattr(inside, "on", False), True
    seen = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    unseen = torch.autograd.graph.saved_tensors_hooks(_same, _same) if seen else contextlib.nullcontext()
    try:
        with _random_states(device), _disable_current_modes(), unseen:
            yield
    finally:
        inside.on = before


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Held:
    """Numbers, texts and containers that a function reaches by its globals and its closure, as they are now."""

    def __init__(self, function: Any) -> None:
        scope, names = function.__globals__, set(_names(function.__code__))
        found: list[tuple[str, Any, str | None]] = [(name, scope, name) for name in names if name in scope]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        found += [(name, cell, None) for name, cell in cells]
        self._kept = [(*place, value, _contents(value)) for place in found if _is_plain(value := _at(*place[1:]))]

    def put_back(self) -> list[str]:
        """Undoes what was changed, and names it."""
        changed = []
        for name, home, key, value, contents in self._kept:
            now = _at(home, key)
            if now is value and _same_items(_contents(now), contents):
                continue
            changed.append(name)
            if type(value) is list:
                value[:] = contents
            elif type(value) in (dict, set):
                value.clear()
                value.update(contents)
            if key is None:
                home.cell_contents = value
            else:
                home[key] = value
        return changed


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _at(home: Any, key: str | None) -> Any:
    if key is not None:
        return home.get(key)
    try:
        return home.cell_contents
    except ValueError:  # nothing was put in yet
        return None


def _is_plain(value: Any) -> bool:
    return type(value) in (bool, int, float, str, type(None), list, dict, set)


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) else None


def _same_items(now: Any, before: Any) -> bool:
    """By identity, as tensors have no truth."""
    if type(now) is dict and type(before) is dict:
        return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())
    if type(now) is list and type(before) is list:
        return len(now) == len(before) and all(map(operator.is_, now, before))
    return bool(now == before)


def twin(value: Any, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """A scheduler, generator or list that may be changed in place of the given one; tensors are what `keep` makes."""
    if isinstance(value, Tensor):
        return keep(value)
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if type(value) in (list, tuple):
        return type(value)(twin(v, keep) for v in value)
    if type(value) is dict:
        return {name: twin(v, keep) for name, v in value.items()}
    if getattr(value, "__dict__", None) and not callable(value):
        double = copy.copy(value)
        for name, held in vars(value).items():
            if isinstance(held, Tensor) or type(held) in (list, dict):
                double.__dict__[name] = twin(held, keep)
        return double
    return value
