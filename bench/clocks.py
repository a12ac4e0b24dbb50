"""How the calls of a contender are timed: by the wall clock, or on the device."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

Run = Callable[[int], object]


class Sample(NamedTuple):
    """Seconds a call: of the work, and of the host alone where that is another number."""

    work: float
    host: float | None = None


class Clock(Protocol):
    """Times `count` calls in a row; a call is given a counter, by which it picks one of its input sets."""

    def calls_for(self, run: Run, budget_s: float) -> int:
        """Calls that take about `budget_s`."""

    def time(self, run: Run, first: int, count: int) -> Sample:
        """Seconds a call of `run(first)` to `run(first + count - 1)`."""


class WallClock:
    """Calls that return when their work is done."""

    def calls_for(self, run: Run, budget_s: float) -> int:
        """Calls that take about `budget_s`."""
        start = time.perf_counter()
        run(0)
        return max(1, min(500, round(budget_s / max(time.perf_counter() - start, 1e-7))))

    def time(self, run: Run, first: int, count: int) -> Sample:
        """Seconds a call."""
        start = time.perf_counter()
        for call in range(first, first + count):
            run(call)
        return Sample((time.perf_counter() - start) / count)


class HostClock(WallClock):
    """What a call costs the host: the calls only queue their work, the wait for it is outside the timing."""

    def __init__(self, synchronize: Callable[[], Any]) -> None:
        self.synchronize = synchronize

    def time(self, run: Run, first: int, count: int) -> Sample:
        """Seconds a call."""
        self.synchronize()
        sample = super().time(run, first, count)
        self.synchronize()
        return sample


class DeviceClock:
    """What a call costs the device: the calls are queued behind a wait that outlasts their queueing.

    The device then never waits for the host, however short a kernel is, and the time to queue is the host's cost.
    Results stay alive for `keep` calls, so that outputs rotate through memory as inputs do.
    """

    MAX_CALLS = 32
    TRIES = 6

    def __init__(self, keep: int, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda
        self.kept: list[object] = [None] * keep
        self.waits: dict[int, float] = {}
        self.cycles_per_s = self._rate()

    def _rate(self) -> float:
        cycles = 10_000_000
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first one loads the kernel
            start.record()
            self.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return float(1e3 * cycles / start.elapsed_time(end))

    def _attempt(self, run: Run, first: int, count: int, wait_s: float) -> tuple[Sample, bool]:
        """A sample, and whether the host had queued everything before the device was let go."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        self.cuda._sleep(int(wait_s * self.cycles_per_s))
        start.record()
        began = time.perf_counter()
        for call in range(first, first + count):
            self.kept[call % len(self.kept)] = run(call)
        host_s = time.perf_counter() - began
        end.record()
        ahead = not start.query()
        end.synchronize()
        return Sample(start.elapsed_time(end) / 1e3 / count, host_s / count), ahead

    def calls_for(self, run: Run, budget_s: float) -> int:
        """Calls that take about `budget_s`, no more than the device's queue holds; fills the memory of the outputs."""
        for call in range(len(self.kept)):
            self.kept[call] = run(call)
        sample, _ = self._attempt(run, 0, 2, 0.0)
        count = max(1, min(self.MAX_CALLS, round(budget_s / max(sample.work, 1e-7))))
        while count > 1:
            # A full queue holds the host up until the wait is over, however long that is.
            self.waits[id(run)] = 1e-3 + 3.0 * count * (sample.host or 0.0)
            if self._attempt(run, 0, count, self.waits[id(run)])[1]:
                break
            count //= 2
        return count

    def time(self, run: Run, first: int, count: int) -> Sample:
        """Seconds a call, on the device and of the host.

        Raises:
            RuntimeError: the host never got ahead of the device.
        """
        wait_s = self.waits.get(id(run), 1e-3)
        for _ in range(self.TRIES):
            sample, ahead = self._attempt(run, first, count, wait_s)
            if ahead:
                return sample
            wait_s *= 2.0
            self.waits[id(run)] = wait_s
        raise RuntimeError(f"{count} calls were not queued within {wait_s:.3g} s; their time would be the host's")
