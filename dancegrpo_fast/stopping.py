"""Signals that end work: raised at once, or kept until the work at hand can be left, in all processes together."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
# Ctrl-C; schedulers and launchers; SLURM's `--signal`; a terminal that was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Seconds. `timeout` and some launchers send a signal twice; a person presses Ctrl-C again later.
TWICE = 1.0


class Stopped(SystemExit):
    """A signal ended the work. The exit status is the shell's for it, 128 + its number.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)
        self.name = signal.Signals(number).name


class Stop:
    """What the signals do inside `with`; before and after it they do what they did.

    The first one is raised as `Stopped`, at once inside `leave_when_asked` or where `at_once` says so; else where all
    processes `agree`. A Ctrl-C after it raises KeyboardInterrupt at once. Signals that were ignored, as under `nohup`,
    stay so; outside of the main thread, and in processes that are forked inside, nothing changes.

    Args:
        at_once: raise the first signal wherever it comes.
        largest: of a number over all processes; None: there is one.
        leaves: `leave_when_asked` ends early; False where its work waits for that of other processes.
        notice: written to standard error after the name of the first signal; None: nothing is.
    """

    def __init__(
        self,
        *,
        at_once: bool = False,
        largest: Callable[[int], int] | None = None,
        leaves: bool = True,
        notice: str | None = None,
    ) -> None:
        self._raises, self._largest, self._leaves, self._notice = at_once, largest, leaves, notice
        self._first, self._since, self._process = 0, 0.0, os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._come)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def leave_when_asked(self, work: Callable[[], T]) -> T:
        """What `work` returns, which changes nothing that lasts and waits for no other process.

        Every process has to call it at the same time.

        Raises:
            Stopped: in all processes, if there was a signal in one of them.
        """
        try:
            try:
                self._raises = self._leaves
                if not (self._first and self._leaves):
                    found = work()
            finally:
                self._raises = False
        except Stopped:
            if not self._first:
                raise
        self.agree()
        return found

    def agree(self) -> None:
        """Raises Stopped in all processes, if there was a signal in one of them; every process has to call it."""
        number = self._first if self._largest is None else self._largest(self._first)
        if number:
            raise Stopped(number)

    def _come(self, number: int, _: object) -> None:
        if os.getpid() != self._process:
            # Pools end the processes that they forked by a signal.
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        elif not self._first:
            self._first, self._since = number, time.monotonic()
            if self._notice is not None:
                # Not `print`, which may be what was interrupted.
                with suppress(OSError):
                    os.write(2, f"{signal.Signals(number).name}: {self._notice}\n".encode())
            if self._raises:
                self._raises = False
                raise Stopped(number)
        elif number == signal.SIGINT and time.monotonic() > self._since + TWICE:
            raise KeyboardInterrupt
