"""What pytest-benchmark does not do: contenders of one case are verified, then timed in turns, by any clock.

The first test of a case measures all of its contenders; each test of the case then hands its own times to the
`benchmark` fixture, on whose timer they pass again.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from .clocks import Clock, Run, Sample
from .environment import environment
from .place import Place
from .rows import Row

# About how long a contender runs within a round; at least one call.
ROUND_S = 0.03
PEERS = ("eager", "compile", "peer")


@dataclass(frozen=True)
class Contest:
    """The contenders of one case.

    Attributes:
        calls: contender -> call, which is given a counter, by which it picks one of its input sets.
        check: raises AssertionError where a contender's result is off its budget.
        info: what is known of a contender, asked when all are timed.
        clock: times them.
        moved: bytes that a contender must move, and that it does move where that is known; the copy is timed beside it.
        sets: of inputs.
        may_fail: contenders that may not run at all, which is an answer.
    """

    calls: Mapping[str, Run]
    check: Callable[[str], None]
    info: Callable[[str], Row]
    clock: Clock
    moved: Callable[[str], tuple[int, int | None]] | None = None
    sets: int = 1
    may_fail: Sequence[str] = ()


def interleave(
    calls: Mapping[str, Run], clock: Clock, rounds: int, seconds: float
) -> tuple[dict[str, list[Sample]], dict[str, int]]:
    """Times every contender once a round, starting each round with another one.

    Args:
        calls: contender -> call.
        clock: times them.
        rounds: at least so many are timed, after one that is thrown away,
        seconds: and for so long for each contender.

    Returns:
        Contender -> its samples, and -> calls in each.
    """
    names = list(calls)
    for run in calls.values():
        run(0)
    counts = {name: clock.calls_for(run, ROUND_S) for name, run in calls.items()}
    counters = dict.fromkeys(names, 0)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    begin, number = time.monotonic(), 0
    while number <= rounds or time.monotonic() - begin < seconds * len(names):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = clock.time(calls[name], counters[name], counts[name])
            counters[name] += counts[name]
            if number > 0:
                samples[name].append(taken)
        number += 1
    return samples, counts


def copy_contender(device: torch.device, size: int) -> Run:
    """torch's `copy_` between two preallocated tensors of `size` bytes."""
    source, target = torch.ones(size // 4, device=device), torch.zeros(size // 4, device=device)
    return lambda call: target.copy_(source)


class Timer:
    """A timer for pytest-benchmark on which measured times pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def restart(self) -> None:
        """Before a sample."""
        self.now = 0.0

    def let_pass(self, seconds: float) -> None:
        """A sample."""
        self.now = seconds


TIMER = Timer()


@dataclass
class Turns:
    """The case in hand, and what was measured of it.

    Attributes:
        place: where.
        rounds, seconds: as `interleave` takes them.
        case: its name.
        wrong: contenders with a result off its budget, and why; failed: those that do not run.
    """

    place: Place
    rounds: int
    seconds: float
    case: str = ""
    contest: Contest | None = None
    wrong: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    _copy: Run | None = None

    def begin(self, case: str, make: Callable[[], Contest]) -> Contest:
        """Makes the contenders of a case, unless it is the one in hand."""
        if self.case != case or self.contest is None:
            self.case, self.contest = case, None
            self.wrong, self.failed, self.samples = {}, {}, {}
            # The next case needs the memory.
            torch._dynamo.reset()
            gc.collect()
            if self.place.device.type == "cuda":
                torch.cuda.empty_cache()
            self.contest = make()
        return self.contest

    def verify(self, name: str) -> None:
        """Fills `wrong` and `failed`."""
        assert self.contest is not None
        try:
            self.contest.check(name)
        except AssertionError as error:
            self.wrong[name] = str(error) or "it is not the reference's"
        except Exception as error:
            # What the other contenders show is worth having.
            self.failed[name] = f"{type(error).__name__}: {error}"

    def measure(self) -> None:
        """Verifies all contenders and times those that are right, and peers."""
        assert self.contest is not None
        for name in self.contest.calls:
            self.verify(name)
        left_out = {*self.failed, *(name for name in self.wrong if name not in PEERS)}
        calls = {name: run for name, run in self.contest.calls.items() if name not in left_out}
        if not calls:
            return
        if self.contest.moved is not None:
            self._copy = self._copy or copy_contender(self.place.device, self.place.copy_bytes)
            calls["copy"] = self._copy
        self.samples, self.counts = interleave(calls, self.contest.clock, self.rounds, self.seconds)

    def refuse(self, name: str) -> None:
        """Ends the test of a contender that was not measured, and says why."""
        if name in self.failed and self.contest is not None and name in self.contest.may_fail:
            pytest.skip(f"it does not run: {self.failed[name]}")
        if name in self.failed or (name in self.wrong and name not in PEERS):
            pytest.fail(f"not measured: {self.failed.get(name) or self.wrong[name]}", pytrace=False)

    def median(self, name: str) -> float | None:
        """Seconds a call."""
        return statistics.median(s.work for s in self.samples[name]) if name in self.samples else None

    def info(self, name: str) -> Row:
        """`extra_info` of a contender that was measured."""
        assert self.contest is not None
        mine, found = self.median(name), dict(self.contest.info(name))
        assert mine is not None
        found |= {
            "backend": name,
            "within_budget": name not in self.wrong,
            "calls_per_round": self.counts[name],
            "input_sets": self.contest.sets,
        }
        host = [s.host for s in self.samples[name] if s.host is not None]
        if host:
            found["host_us_median"] = 1e6 * statistics.median(host)
        for peer in (peer for peer in PEERS if peer in self.contest.calls and peer != name):
            theirs = self.median(peer)
            found[f"times_{peer}"] = None if theirs is None else theirs / mine
        copy = self.median("copy")
        if copy is not None and self.contest.moved is not None:
            least, moved = self.contest.moved(name)
            rate, copied = least / mine / 1e9, 2 * self.place.copy_bytes / copy / 1e9
            found |= {"bytes_minimum": least, "bytes_moved": moved, "gb_per_s": rate}
            found |= {"copy_gb_per_s": copied, "copy_share": rate / copied}
        return found | {"environment": environment(self.place.device, dry=self.place.dry)}

    def replay(self, benchmark: Any, name: str) -> None:
        """Hands a contender's times to the `benchmark` fixture."""
        times = iter([sample.work for sample in self.samples[name]])
        benchmark.pedantic(
            lambda: TIMER.let_pass(next(times)), setup=TIMER.restart, rounds=len(self.samples[name]), iterations=1
        )


def cross(metafunc: pytest.Metafunc, cases: Sequence[Any], contenders: Sequence[str], why: str = "") -> None:
    """Every case with every contender; where there is no case, one skipped test that says why."""
    skipped = [pytest.param(None, marks=pytest.mark.skip(reason=why), id="none")]
    metafunc.parametrize("case", list(cases) or skipped, ids=str)
    metafunc.parametrize("contender", list(contenders) if cases else ["none"])
