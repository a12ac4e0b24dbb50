"""What the plug-ins share: saying things once, the step that stands in for an engine's, block ops in a model."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

_said: set[str] = set()


def say(text: str) -> None:
    """One line on stderr, once in a process, and by the first rank alone where ranks are known."""
    from torch import distributed

    known = distributed.is_available() and distributed.is_initialized()
    if text in _said or (known and distributed.get_rank() != 0):
        return
    _said.add(text)
    print(f"dancegrpo-fast: {text}", file=sys.stderr, flush=True)


def engine(name: str, wanted: str) -> ModuleType:
    """A module of the engine.

    Raises:
        ImportError: it is not there; the message says what has to be installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name}: got {error}, want {wanted}", name=error.name) from error


@functools.cache
def replacements(rounding: str, backend: str) -> Any:
    """What tries our steps against an engine's own at the first call; one for each setting."""
    from ..dropin.replaced import Replacements
    from ..dropin.settings import Settings

    # An engine rolls out in other processes, or takes some steps itself: an audit would miss what it has to see.
    return Replacements(Settings(rounding=rounding, backend=backend), say, audited=False)


def stand_in(method: Callable[..., Any], owner: str, rounding: str = "exact", backend: str = "auto") -> Any:
    """Ours for a method of a class named `owner`, if it computes what the method does; else the method."""
    return replacements(rounding, backend).stand_in(method, owner, method.__module__)


def is_taken(method: Callable[..., Any], rounding: str = "exact", backend: str = "auto") -> bool:
    """Whether calls of a method for which ours stand in have been found to be the same as ours."""
    known = [d for d in replacements(rounding, backend).definitions if d.function is method and d.dispatch is not None]
    return any(d.dispatch.taken for d in known)


def reader(function: Callable[..., Any], name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Reads one argument of a call of `function`: `reader(f, "x")(args, kwargs)`; None for one that it lacks."""
    parameters = inspect.signature(function).parameters
    if name not in parameters:
        return lambda args, kwargs: None
    place, default = list(parameters).index(name), parameters[name].default

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[place] if place < len(args) else kwargs.get(name, default)

    return read


def put_blocks(model: nn.Module, mode: str, where: str) -> str | None:
    """Block ops in a transformer; says that they are in, or gives the reason why not, and says that."""
    from ..patch import accelerate

    try:
        patched = accelerate(model, mode)
    except ValueError as error:
        say(f"{where}: no block ops, {error}")
        return str(error)
    say(f'{where}: block ops, "{mode}", in a {type(patched.transformer).__name__}')
    return None
