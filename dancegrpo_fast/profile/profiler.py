"""Where a real run's memory and time go, in the planner's categories, against what was predicted."""

import bisect
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import marks as _phases
from ..memory.planning.budget import CATEGORIES, Plan
from .books import Books, Segment
from .cuda import Counters, Reading

if TYPE_CHECKING:
    from ..recipe import Recipe

phase = _phases.phase


@dataclass
class Row:
    """What one phase took, over all its times; bytes are those of the piece of it with the most.

    Attributes:
        name: of the phase.
        pieces: how often it ran; a phase that is interrupted by an inner one has a piece before and one after.
        seconds: on the clock, in all pieces; following the operators makes a run slower.
        budget: bytes by category at the peak.
        saved_by_group: those of "saved" by the group of the operator that made them.
        op, module: what ran at the peak; empty where the phase began with its peak.
        allocator: the same peak by torch's CPU allocator, which also sees what operators allocate within; or None.
        allocated, reserved: CUDA's `max_memory_allocated` and `max_memory_reserved`, or None.
        resident: with a snapshot, CUDA's blocks at the end of the last piece by category.
        timeline: (share of that piece's time that has passed, bytes by category) at its highest moments.
    """

    name: str
    pieces: int = 0
    seconds: float = 0.0
    budget: dict[str, int] = field(default_factory=dict)
    saved_by_group: dict[str, int] = field(default_factory=dict)
    op: str = ""
    module: str = ""
    allocator: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    resident: dict[str, int] = field(default_factory=dict)
    timeline: tuple[tuple[float, dict[str, int]], ...] = ()

    @property
    def bytes(self) -> int:
        """Of tensors at the peak: the sum of `budget`."""
        return sum(self.budget.values())

    def _add(self, segment: Segment, reading: Reading | None) -> None:
        self.pieces += 1
        self.seconds += segment.seconds
        if segment.bytes >= self.bytes:
            self.budget, self.saved_by_group = segment.budget, segment.saved_by_group
            self.op, self.module, self.timeline = segment.op, segment.module, segment.timeline
        if reading is not None:
            self.allocated = max(self.allocated or 0, reading.allocated)
            self.reserved = max(self.reserved or 0, reading.reserved)
            self.resident = reading.resident


@dataclass
class Report:
    """What `profile` measured; complete once its block ends.

    Attributes:
        device: whose memory it is.
        rows: of every phase, in the order in which they first ran; "other" is what ran in none.
        before: bytes by category that were there at the start.
        predicted: bytes by category at the peak of phases, where there is a prediction.
        title: of pictures: what ran.
        notes: lines below the table.
    """

    device: str
    rows: dict[str, Row] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    predicted: dict[str, dict[str, int]] = field(default_factory=dict)
    title: str = ""
    notes: list[str] = field(default_factory=list)

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Marks a stage of what is measured: `with report.phase("rollout"):`, or as a decorator."""
        return _phases.phase(name)

    @property
    def peak(self) -> Row:
        """The phase with the most bytes.

        Raises:
            ValueError: nothing was measured.
        """
        if not self.rows:
            raise ValueError("report: got one before its profile ended, want it afterwards")
        return max(self.rows.values(), key=lambda row: row.bytes)

    def deviation(self, name: str) -> float | None:
        """Predicted over measured bytes of a phase, less 1; None without a prediction."""
        row = self.rows.get(name)
        if row is None or not row.bytes or name not in self.predicted:
            return None
        return sum(self.predicted[name].values()) / row.bytes - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in bytes and seconds."""
        return {
            "device": self.device,
            "before": dict(self.before),
            "phases": [
                {
                    **{name: value for name, value in vars(row).items() if value is not None},
                    "bytes": row.bytes,
                    "predicted": self.predicted.get(row.name),
                    "deviation": self.deviation(row.name),
                }
                for row in self.rows.values()
            ],
        }

    def figures(self, folder: str | Path) -> list[Path]:
        """Draws the phases' bytes by category with the predicted peaks, and what is kept for the backward.

        Args:
            folder: made if it is not there; "timeline" and "saved" are written in it, as PNG and as SVG.

        Returns:
            The files.

        Raises:
            OSError: the folder cannot be written.
            ValueError: nothing was measured.
        """
        from .pictures import draw

        return draw(self, folder)

    def table(self) -> str:
        """Phases by categories at each phase's peak, in GiB or MiB, with what was predicted."""
        from .pictures import unit_of

        unit, name = unit_of(self)
        shown = [c for c in CATEGORIES if any(row.budget.get(c) for row in self.rows.values())]
        extra = [c for c in ("allocator", "allocated", "reserved") if any(getattr(r, c) for r in self.rows.values())]
        prediction = ["predicted", "deviation"] if self.predicted else []
        lines = [["phase", "seconds", *shown, "total", *extra, *prediction, "peak at"]]
        for row in self.rows.values():
            bytes_ = [row.budget.get(c, 0) for c in shown] + [row.bytes] + [getattr(row, c) for c in extra]
            cells = ["" if size is None else f"{size / unit:.3f}" for size in bytes_]
            if prediction:
                off = self.deviation(row.name)
                total = sum(self.predicted.get(row.name, {}).values())
                cells += ["", ""] if off is None else [f"{total / unit:.3f}", f"{off:+.1%}"]
            where = f"{row.op} in {row.module}" if row.module else row.op
            lines.append([row.name, f"{row.seconds:.3f}", *cells, where])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        last = len(widths) - 1
        text = [
            "  ".join(
                cell if i == last else cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([f"{name} of tensors on {self.device}, at the peak of each phase", *text, *self._notes()])

    def _notes(self) -> list[str]:
        known = [(row.bytes, row.allocator) for row in self.rows.values() if row.allocator]
        if not known:
            return self.notes
        worst = max((allocator / size - 1 for size, allocator in known if size), key=abs)
        return [f"torch's CPU allocator: {worst:+.2%} of a phase's total at most, beside these tensors", *self.notes]


class _Profiler:
    """One running profile: the books, and what else is read at phase boundaries."""

    def __init__(self, report: Report, device: torch.device, allocator: bool, snapshot: bool) -> None:
        self.report = report
        self._counters = Counters(device, snapshot) if device.type == "cuda" else None
        self.books = Books(device, self._boundary, None if self._counters is None else self._counters.wait)
        self._events: torch.profiler.profile | None = None
        self._marks: list[tuple[str, int]] = []
        self._mark: Any = None
        if allocator:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._events = torch.profiler.profile(activities=activities, profile_memory=True)

    def phase(self, name: str) -> contextlib._GeneratorContextManager[None]:
        return self.books.inside(name)

    def _boundary(self, segment: Segment | None) -> None:
        if segment is None:
            if self._counters is not None:
                self._counters.start()
            if self._events is not None:
                self._mark = torch.profiler.record_function(f"dancegrpo_fast phase {len(self._marks)}")
                self._mark.__enter__()
            return
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._marks.append((segment.name, segment.start_bytes))
        reading = None if self._counters is None else self._counters.stop(self.books.addresses)
        self.report.rows.setdefault(segment.name, Row(segment.name))._add(segment, reading)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._events is not None:
                stack.enter_context(self._events)
            stack.enter_context(self.books.keeping(self.report.before))
            yield
        if self._events is not None:
            self._read(self._events)

    def _read(self, events: torch.profiler.profile) -> None:
        """Peaks of the CPU allocator's running total; it knows changes, so it starts from the books' first total."""
        found: Any = events.profiler
        memory, spans = [], {}
        for event in found.kineto_results.events():
            if event.name() == "[memory]" and event.device_type().name == "CPU":
                memory.append((event.start_ns(), event.nbytes()))
            elif event.name().startswith("dancegrpo_fast phase "):
                spans[int(event.name().rpartition(" ")[2])] = event.start_ns(), event.start_ns() + event.duration_ns()
        memory.sort(key=lambda change: change[0])
        times = [when for when, _ in memory]
        totals = list(accumulate((size for _, size in memory), initial=0))
        base: int | None = None
        for number, (name, start_bytes) in enumerate(self._marks):
            first, last = (bisect.bisect_right(times, when) for when in spans[number])
            base = start_bytes - totals[first] if base is None else base
            row = self.report.rows[name]
            row.allocator = max(row.allocator or 0, base + max(totals[first : last + 1]))


@contextlib.contextmanager
def profile(
    predicted: Plan | Mapping[str, Mapping[str, int]] | None = None,
    *,
    device: str | torch.device | None = None,
    allocator: bool = False,
    snapshot: bool = False,
) -> Iterator[Report]:
    """Measures what runs inside: live tensors by category, peaks, and time, phase by phase.

    The trainer marks its phases itself; other code says `with report.phase("rollout"):`. Backward passes
    and optimiser steps become phases by themselves. Bytes are those of tensor storages, counted
    at python's dispatch; what operators allocate within themselves is not in them. "trajectories" are all tensors that
    belong to no model and are not kept for a backward. Work inside `torch.compile` is counted as it runs without it.

    Args:
        predicted: a planner's `Plan`, or bytes by category of phases, to compare with.
        device: whose memory; None: CUDA's where there is one, else the CPU's.
        allocator: on the CPU, also follow torch's allocator, through `torch.profiler`.
        snapshot: on CUDA, also read at the end of each phase which blocks are whose.

    Raises:
        RuntimeError: inside another profile.
        ValueError: an option that the device does not have.
    """
    if _phases.running:
        raise RuntimeError("profile: got one inside another, want one at a time")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f'device: got "{chosen}", want cpu or cuda')
    for name, asked, kind in (("allocator", allocator, "cpu"), ("snapshot", snapshot, "cuda")):
        if asked and chosen.type != kind:
            raise ValueError(f"{name}: got True on {chosen}, want a profile of {kind}")
    report = Report(str(chosen))
    if predicted is not None:
        known = predicted.items() if isinstance(predicted, Mapping) else [(p.name, p.budget) for p in predicted.phases]
        report.predicted = {name: dict(budget) for name, budget in known}
    profiler = _Profiler(report, chosen, allocator, snapshot)
    _phases.running.append(profiler)
    try:
        with profiler.running():
            yield report
    finally:
        _phases.running.clear()


def profile_recipe(
    recipe: "Recipe | str | Path", iterations: int = 1, *, overrides: Sequence[str] = (), predicted: Plan | None = None
) -> Report:
    """Profiles iterations of a recipe's training, after one that is not measured, so that the optimiser has its state.

    It writes to a temporary folder, evaluates nothing and compiles nothing. Without `predicted`, on the CPU, what the
    trainer's own code does is predicted by running it with the same settings on fake tensors; on a GPU, all phases are
    by the planner.

    Args:
        recipe: or its file.
        iterations: to measure.
        overrides: of a file, as on the command line: `["--train.micro_batch", "4"]`.
        predicted: a planner's `Plan` to compare with.

    Raises:
        ValueError: a recipe that cannot be run, or fewer than 1 iteration.
    """
    from ..recipe import Recipe, load_recipe
    from ..train.loop import Trainer
    from .predict import planned, predict

    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, want at least 1")
    if not isinstance(recipe, Recipe):
        recipe, _ = load_recipe([str(recipe), *overrides])
    with tempfile.TemporaryDirectory() as folder:
        # What a compiled graph holds cannot be seen.
        model = replace(recipe.model, compile=None)
        trainer = Trainer(replace(recipe, model=model, output_dir=folder, evaluation=None, tracking=[]))
        try:
            trainer.iteration(1)
            on_cpu = trainer.device.type == "cpu"
            with profile(predicted, device=trainer.device, allocator=on_cpu) as report:
                rows = [trainer.iteration(number) for number in range(2, iterations + 2)]
            report.title = _title(recipe)
            if recipe.model.compile is not None:
                report.notes.append(f'model.compile "{recipe.model.compile}" is left out: measured without it')
            if predicted is None and on_cpu and trainer.model.passes != 2:
                report.notes += ["not predicted: one pass on a CPU"]
            elif predicted is None and on_cpu:
                report.predicted = predict(trainer, report.before, rows)
            elif predicted is None:
                report.predicted, notes = planned(trainer)
                report.notes += notes
        finally:
            trainer.accelerator.end_training()
    return report


def _title(recipe: "Recipe") -> str:
    model, sampler = recipe.model, recipe.sampler
    parts = [
        recipe.name,
        f"{sampler.frames} frames" if sampler.frames > 1 else "",
        f"{sampler.height} x {sampler.width}",
        f"micro-batch {recipe.train.micro_batch}",
        f"LoRA {model.lora.rank}" if model.lora else "full fine-tuning",
        model.dtype + (" under autocast" if recipe.train.mixed_precision != "no" else ""),
        f"{model.quantization} base" if model.quantization else "",
        f"checkpointing {model.checkpointing}",
    ]
    return ", ".join(part for part in parts if part)
