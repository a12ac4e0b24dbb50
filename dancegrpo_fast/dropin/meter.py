"""Calls, times and host reads of ours and of the original, on a script's own arguments."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .apart import beside, twin

# Calls beside which the original is called and timed, too. The first one builds tables and is left out, and so is the
# one in which host reads are counted; later ones know every step.
_TIMED, _COUNTED, _LAST = frozenset({2, 4, 16, 64, 256}), 3, 256
_WATCHED = _TIMED | {_COUNTED}
_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
Values = tuple[Any, ...]


class HostReads(TorchDispatchMode):
    """Counts what waits for a device: reads of a value that lies on it, and copies from it to the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.count, self._device = 0, device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if any(isinstance(a, Tensor) and a.device.type == self._device for a in args):
            copied = name in ("_to_copy", "copy_") and self._device != "cpu" and found.device.type == "cpu"
            self.count += copied or name in _READS
        return found


class Clock:
    """Microseconds of something on a device; nothing waits for it before it is asked."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Start or stop."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter_ns())

    def read(self) -> float:
        """From start to stop; waits for the device."""
        start, stop = self._marks
        if not self._cuda:
            return float(stop - start) / 1e3
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3


class Meter:
    """One function's calls by kind, rollout and replay; `original` takes a call's values."""

    def __init__(self, original: Callable[[Values], Any]) -> None:
        self.original = original
        self.calls = [0, 0]
        self.ours: tuple[list[Clock], list[Clock]] = ([], [])
        self.theirs: tuple[list[Clock], list[Clock]] = ([], [])
        self.reads: list[int | None] = [None, None]
        self.read_by_ours: list[int | None] = [None, None]
        self.untimed = ""

    def run(self, ours: Callable[[Values], Any], values: Values, replay: bool) -> Any:
        """Ours; now and then the original beside it."""
        self.calls[replay] = number = self.calls[replay] + 1
        if number > _LAST or number not in _WATCHED:
            return ours(values)
        device = next(v.device for v in values if isinstance(v, Tensor))
        self._try(values, replay, device)
        if number == _COUNTED:
            with HostReads(device) as reads:
                found = ours(values)
            self.read_by_ours[replay] = reads.count
            return found
        clock = Clock(device)
        clock.mark()
        found = ours(values)
        clock.mark()
        self.ours[replay].append(clock)
        return found

    def _try(self, values: Values, replay: bool, device: torch.device) -> None:
        if self.untimed:
            return
        try:
            with beside(device):
                if self.reads[replay] is None:
                    with HostReads(device) as reads:
                        self.original(twin(values))
                    self.reads[replay] = reads.count
                clock, values = Clock(device), twin(values)
                clock.mark()
                self.original(values)
                clock.mark()
                self.theirs[replay].append(clock)
        except Exception as error:  # out of memory, or a side effect that can be had once
            self.untimed = f"{type(error).__name__}: {error}"
