"""One process of `run`: starts the replacements, notes what was defined, and closes with the report. Needs no torch."""

import atexit
import os
from collections.abc import Mapping
from multiprocessing import util
from types import FunctionType
from typing import Any

from . import children, imports, loading
from .known import candidates
from .replaced import Replacements
from .settings import Settings, say


class Process:
    """What is replaced in this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.replacements = Replacements(settings)
        self.seen: set[str] = set()

    def define(self, function: FunctionType) -> Any:
        """What stands in for a function: itself, where its name is unknown or not wanted."""
        owner, _, name = function.__qualname__.rpartition(".")
        names = {function.__qualname__, f"{function.__module__}:{function.__qualname__}"}
        if not candidates(name, owner or None):
            return function
        self.seen |= names
        only, skip = self.settings.only, self.settings.skip
        if (only and names.isdisjoint(only)) or not names.isdisjoint(skip):
            return function
        code = function.__code__
        return self.replacements.stand_in(function, owner or None, f"{code.co_filename}:{code.co_firstlineno}")

    def start(self) -> None:
        """Everything that is defined, loaded or spawned is looked at from now on."""
        watch: Mapping[str, Any] = {}
        if self.settings.accelerate is not None:
            watch = loading.install(self.settings.accelerate, say)
        imports.install(self.define, watch)
        imports.replace_loaded(self.define)
        children.follow(self.settings)
        children.tell_of_others()

    def finish(self) -> None:
        """Says what was done; names that were asked for and never occurred, too."""
        for option, names in (("--only", self.settings.only), ("--skip", self.settings.skip)):
            for name in names:
                if name not in self.seen:
                    say(f"{option} {name}: no such function was defined")
        if not self.seen:
            say("no step function of a known project was defined in this process: nothing was replaced (see --help)")
        self.replacements.finish()


def begin(settings: Settings) -> None:
    """For the process of the script itself."""
    process, own = Process(settings), os.getpid()
    # First in, so last out: after what the script says at its end. Not in a process that was forked.
    atexit.register(lambda: process.finish() if os.getpid() == own else None)
    process.start()


def arrive(fields: Mapping[str, Any]) -> None:
    """For a process that `multiprocessing` started; it reports for itself, where it called something."""
    process = Process(Settings(**fields))
    process.start()
    own = os.getpid()

    def close(process: Process) -> None:
        if os.getpid() == own:
            # Runs where `atexit` does not.
            util.Finalize(None, process.replacements.finish, exitpriority=-1)

    close(process)
    # A fork server's process forgets what was there before this.
    util.register_after_fork(process, close)
