"""The mark that code puts on its stages, and what a running profiler makes of it."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


class _Unmarked:
    """No profiler runs: a context that does nothing, and a decorator that returns the function itself."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, function: _F) -> _F:
        return function


class _Profiler(Protocol):
    def phase(self, name: str) -> contextlib._GeneratorContextManager[None]: ...


UNMARKED = _Unmarked()
# The profiler that runs in this process, in a list of at most one.
running: list[_Profiler] = []


def phase(name: str) -> _Unmarked | contextlib._GeneratorContextManager[None]:
    """Marks a stage: `with phase("rollout"):`, or `phase("rollout")(function)(arguments)`; free without a profiler.

    Stages may be nested: the inner one's memory and time are its own.
    """
    return running[-1].phase(name) if running else UNMARKED
