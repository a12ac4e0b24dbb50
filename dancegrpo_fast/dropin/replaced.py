"""What stands in for the step functions of a process. Needs no torch before the first of them is called."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .known import candidates
from .report import collect, finish
from .settings import Settings, inside
from .settings import say as say_aloud

if TYPE_CHECKING:
    from .audit import Audit
    from .dispatch import Dispatch


class Definition:
    """A step function of a script, from where it is defined to who takes its calls."""

    def __init__(
        self, replacements: "Replacements", function: Callable[..., Any], owner: str | None, where: str
    ) -> None:
        self.replacements, self.function, self.owner, self.where = replacements, function, owner, where
        self.call: Callable[..., Any] | None = None
        self.dispatch: Dispatch | None = None

    @property
    def label(self) -> str:
        """The function's name as the script has it, with its class."""
        return self.function.__name__ if self.owner is None else f"{self.owner}.{self.function.__name__}"

    def start(self) -> Callable[..., Any]:
        """What takes the calls from now on; this is where torch is imported."""
        if getattr(inside, "on", False):
            return lambda args, kwargs: self.function(*args, **kwargs)
        compiler = sys.modules.get("torch._dynamo")
        # A first call from compiled code would have it trace all of this.
        begin: Callable[[], Callable[..., Any]] = self._begin if compiler is None else compiler.disable(self._begin)
        return begin()

    start._torchdynamo_disable = True  # type: ignore[attr-defined]  # as `torch.compiler.disable` marks a function

    def _begin(self) -> Callable[..., Any]:
        from .audit import Audit
        from .dispatch import Dispatch

        with self.replacements.lock:
            if self.replacements.audit is None and self.replacements.audited:
                self.replacements.audit = Audit(self.replacements.say)
            if self.call is None:
                self.dispatch = Dispatch(self)
                self.call = self.dispatch.entry()
            return self.call


class Replacements:
    """What stands in for known functions in this process: one for each definition, counted and reported together.

    Args:
        settings: how ours compute.
        say: takes a line of text; default: stderr.
        strict: a function that cannot be replaced raises ValueError when it is called, instead of going on as it is.
        audited: the first update is audited. Off where rollouts are in other processes than replays.
    """

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None] | None = None,
        *,
        strict: bool = False,
        audited: bool = True,
    ) -> None:
        self.settings, self.strict, self.audited = settings, strict, audited and not strict
        self.lock = threading.RLock()
        self.definitions: list[Definition] = []
        self.refused: list[str] = []
        self.audit: Audit | None = None
        self._say = say_aloud if say is None else say
        self._said: set[str] = set()
        self._made: dict[int, Callable[..., Any]] = {}

    def say(self, text: str) -> None:
        """Says something, once."""
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def refuse(self, text: str) -> None:
        """Says why a function stays as it is.

        Raises:
            ValueError: this, where `strict`.
        """
        if self.strict:
            raise ValueError(text)
        if text not in self.refused:
            self.refused.append(text)
        self.say(text)

    def stand_in(self, function: Any, owner: str | None, where: str) -> Any:
        """What a script shall hold in place of `function`; nothing is looked at before it is called.

        Args:
            function: a plain function with a known name, or a method as it lies in its class.
            owner: the name of its class.
            where: what a report calls the place, "train.py:131".

        Returns:
            A function of the same name and signature, the same at every call for the same `function`; or `function`
            itself where nothing can stand in for it, with the reason said.
        """
        if not inspect.isfunction(function):
            name = getattr(function, "__name__", repr(function))
            self.refuse(f"{where} {name}: not replaced: got a {type(function).__name__}, want a function or method")
            return function
        if not candidates(function.__name__, owner):
            return function
        with self.lock:
            known = self._made.get(id(function))
            if known is not None:
                return known
            definition = Definition(self, function, owner, where)

            def replaced(*args: Any, **kwargs: Any) -> Any:
                call = definition.call
                if call is None:
                    call = definition.start()
                return call(args, kwargs)

            # torch.compile keeps what it made by code object, and mistakes one definition for another of the same code.
            replaced.__code__ = replaced.__code__.replace()
            functools.update_wrapper(replaced, function)
            self.definitions.append(definition)
            # `__wrapped__` keeps the original, and with it its id.
            self._made[id(function)] = self._made[id(replaced)] = replaced
        return replaced

    def report(self) -> dict[str, Any]:
        """What happened so far, in plain numbers, texts, lists and dicts."""
        return collect(self)

    def finish(self) -> None:
        """Prints the table of the report, and writes the report to the file of `settings.report`."""
        finish(self)
