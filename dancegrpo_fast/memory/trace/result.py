"""What a trace found: storages with their lives, peaks, and what each phase keeps, computes and moves."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ...activations import operators

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "inputs",
    "outputs",
    "block_inputs",
    "saved",
    "recomputation",
    "temporaries",
    "workspace",
)
PHASES = ("load", "rollout", "forward", "backward", "optimizer")


class Storage:
    """One allocation: its bytes, what made it where, and from which event to which it lived."""

    __slots__ = ("born", "category", "died", "died_phase", "module", "op", "phase", "recomputed", "reference", "size")

    def __init__(self, size: int, op: str, module: str, phase: str, born: int, category: str, recomputed: bool) -> None:
        self.size, self.op, self.module, self.phase, self.born = size, op, module, phase, born
        self.category, self.recomputed = category, recomputed
        self.died: int | None = None
        self.died_phase: str | None = None
        self.reference: Any = None

    @property
    def group(self) -> str:
        """Of the operator."""
        return operators.group(self.op)


class Event(NamedTuple):
    """One change of the live bytes: `size` is negative where a storage dies. `op` and `module` made the storage."""

    size: int
    category: str
    op: str
    module: str
    phase: str


@dataclass(frozen=True)
class Peak:
    """The moment of the most live bytes: what ran (`phase`, `op`, `module`), and what was alive."""

    bytes: int
    phase: str
    op: str
    module: str
    by_category: dict[str, int]


@dataclass(frozen=True)
class Trace:
    """What `trace` and `measure` found; all numbers are bytes, or floating-point operations.

    Attributes:
        storages: every storage, in the order of birth.
        phases: of each phase that ran, its first event and the one after its last.
        flops: by (module path, group) of each phase ("recompute" is what a checkpoint or a block op computes again in
            the backward), what matrix products, convolutions, attention and block ops compute.
        traffic: the same of bytes that other operators read and write.
        launches: operators of each phase that compute or move something; each starts a kernel at least.
        handed: bytes that the checkpoint of a module, by its path, is the first to keep as an input.
    """

    storages: list[Storage]
    phases: dict[str, tuple[int, int]]
    flops: dict[str, Counter[tuple[str, str]]]
    traffic: dict[str, Counter[tuple[str, str]]]
    launches: dict[str, int]
    handed: dict[str, int]

    @cached_property
    def flops_by_group(self) -> dict[str, Counter[str]]:
        """Of each phase."""
        return _by_group(self.flops)

    @cached_property
    def bytes_by_group(self) -> dict[str, Counter[str]]:
        """Of each phase."""
        return _by_group(self.traffic)

    @cached_property
    def changes(self) -> list[tuple[int, Storage]]:
        """Births (+1) and deaths (-1), in order."""
        born = [(s.born, 1, s) for s in self.storages]
        died = [(s.died, -1, s) for s in self.storages if s.died is not None]
        return [(sign, storage) for _, sign, storage in sorted(born + died, key=lambda change: change[0])]

    @cached_property
    def events(self) -> list[Event]:
        """Every change of the live bytes, in order."""
        return [
            Event(sign * s.size, s.category, s.op, s.module, s.phase if sign > 0 else str(s.died_phase))
            for sign, s in self.changes
        ]

    @cached_property
    def timeline(self) -> list[int]:
        """Live bytes after each event."""
        live, found = 0, []
        for sign, storage in self.changes:
            live += sign * storage.size
            found.append(live)
        return found

    def alive(self, after: int) -> list[Storage]:
        """What lives after so many events."""
        return [s for s in self.storages if s.born < after and (s.died is None or s.died >= after)]

    def peak_of(self, *phases: str) -> Peak:
        """The peak within these phases, among those that ran.

        Raises:
            ValueError: a phase that did not run.
        """
        best, at = -1, 0
        for phase in phases:
            start, stop = self._range(phase)
            for index in range(max(start - 1, 0), stop):
                if self.timeline[index] > best:
                    best, at = self.timeline[index], index
        alive = self.alive(at + 1)
        sign, last = self.changes[at]
        phase = last.phase if sign > 0 else str(last.died_phase)
        return Peak(max(best, 0), phase, last.op, last.module, _sums(alive, lambda s: s.category))

    @cached_property
    def peak(self) -> Peak:
        """Over all phases."""
        return self.peak_of(*self.phases)

    def _range(self, phase: str) -> tuple[int, int]:
        if phase not in self.phases:
            raise ValueError(f'phase: got "{phase}", want one of {", ".join(self.phases)}')
        return self.phases[phase]

    def live(self, phase: str) -> dict[str, int]:
        """Bytes of each category that live when a phase ends.

        Raises:
            ValueError: a phase that did not run.
        """
        return _sums(self.alive(self._range(phase)[1]), lambda s: s.category)

    @cached_property
    def kept(self) -> list[Storage]:
        """Activations that the backward needs: those which live on after the forward."""
        if "forward" not in self.phases:
            return []
        alive = self.alive(self.phases["forward"][1])
        return [s for s in alive if s.category in ("saved", "block_inputs")]

    @property
    def kept_bytes(self) -> int:
        """Of activations, after the forward."""
        return sum(s.size for s in self.kept)

    @property
    def saved_by_group(self) -> dict[str, int]:
        """Kept activations by the group of the operator that made them; inputs of checkpoints as "block_inputs"."""
        return _sums(self.kept, lambda s: "block_inputs" if s.category == "block_inputs" else s.group)

    @property
    def saved_by_module(self) -> dict[str, int]:
        """Kept activations by the module that made them."""
        return _sums(self.kept, lambda s: s.module)


def _sums(storages: Iterable[Storage], key: Callable[[Storage], str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for storage in storages:
        found[key(storage)] += storage.size
    return dict(found.most_common())


def _by_group(work: dict[str, Counter[tuple[str, str]]]) -> dict[str, Counter[str]]:
    """Summed over the modules."""
    found: dict[str, Counter[str]] = {}
    for phase, counts in work.items():
        one: Counter[str] = Counter()
        found[phase] = one
        for (_, group), count in counts.items():
            one[group] += count
    return found
