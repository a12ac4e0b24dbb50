"""What stands in for a known function: ours, from the first call on, where the signature fits."""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from ._known import candidates, misfit
from ._settings import Settings, say


class Replacements:
    """The replaced functions of a process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def stand_in(self, function: FunctionType, owner: str | None, where: str) -> Callable[..., Any]:
        """What the script shall hold."""
        chosen: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if not chosen:
                chosen.append(self._choose(function, owner, where))
            return chosen[0](*args, **kwargs)

        return stand_in

    def _choose(self, function: FunctionType, owner: str | None, where: str) -> Callable[..., Any]:
        reason: str | None = None
        for known in candidates(function.__name__, owner):
            reason = misfit(known, inspect.signature(function).parameters.values())
            if reason is None:
                say(f"{where} {function.__qualname__} -> {known.target}")
                settings = {"rounding": self.settings.rounding, "backend": self.settings.backend}
                return functools.partial(known.load(), **settings, **known.options)
        say(f"{where} {function.__qualname__}: left alone: {reason}")
        return function

    def finish(self) -> None:
        """Closes the report."""
