"""What a plan is, phases with bytes by category; as text and for JSON."""

from dataclasses import dataclass
from typing import Any

from .settings import GIB, Settings
from .verdict import Verdict, line, sentence

CATEGORIES = (
    "parameters",
    "unsharded block",
    "gradients",
    "optimizer",
    "master weights",
    "block inputs",
    "saved",
    "recomputation",
    "temporaries",
    "workspace",
    "trajectories",
    "other models",
    "replica",
)


@dataclass(frozen=True)
class Phase:
    """One phase of an iteration.

    Attributes:
        name: of the phase.
        budget: bytes by category at its peak.
        seconds: of one iteration; counted work over assumed rates.
        op, module: what runs at the peak.
        timeline: (share of the phase that has passed, bytes by category).
    """

    name: str
    budget: dict[str, int]
    seconds: float
    op: str
    module: str
    timeline: tuple[tuple[float, dict[str, int]], ...]

    @property
    def bytes(self) -> int:
        """At the peak."""
        return sum(self.budget.values())


@dataclass(frozen=True)
class Advice:
    """One setting changed: GiB that the peak changes by, and the relative change of the iteration's seconds."""

    text: str
    gib: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        settings: what was asked.
        phases: in the order of time.
        margins: guesses in bytes, beside what is exact.
        saved_by_group: bytes that the replay's forward keeps, by the group of operators that made them.
        policy: of checkpointing, used or chosen.
        reasons: for the policy and the attention, and what was assumed.
        advice: ranked.
        cards: whether it fits each size of card, `checkpointing auto` solved for each.
        gradient_sync: "update" or "call", as asked or chosen.
    """

    settings: Settings
    phases: tuple[Phase, ...]
    margins: dict[str, int]
    saved_by_group: dict[str, int]
    policy: str
    reasons: tuple[str, ...]
    advice: tuple[Advice, ...] = ()
    cards: tuple[Verdict, ...] = ()
    gradient_sync: str = "update"

    @property
    def peak(self) -> Phase:
        """The phase of the most bytes."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak_bytes(self) -> int:
        """Without margins."""
        return self.peak.bytes

    @property
    def total_bytes(self) -> int:
        """With margins."""
        return self.peak_bytes + sum(self.margins.values())

    @property
    def seconds(self) -> float:
        """Of one iteration."""
        return sum(phase.seconds for phase in self.phases)

    def fits(self, gib: float) -> bool:
        """Whether all of it, with the margins, is in so many GiB."""
        return self.total_bytes <= gib * GIB

    def table(self) -> str:
        """As text: phases by categories in GiB, the peak, margins, what it fits, reasons and advice."""
        shown = [name for name in CATEGORIES if any(phase.budget.get(name) for phase in self.phases)]
        rows = [["GiB", *shown, "sum", "seconds"]]
        for phase in self.phases:
            parts = [phase.budget.get(name, 0) for name in shown]
            rows.append([phase.name, *map(_gib, parts), _gib(phase.bytes), _seconds(phase.seconds)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [*([sentence(self, self.cards)] if self.cards else []), _head(self), ""]
        for name, *cells in rows:
            right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *right]))
        peak = self.peak
        where = f" in {peak.module}" if peak.module else ""
        lines += ["", f"peak: {_gib(peak.bytes)} GiB exact, in {peak.name}: {peak.op}{where}"]
        margins = ", ".join(f"{name} {_gib(size)}" for name, size in self.margins.items())
        lines.append(f"margins (guesses): {margins}; with them {_gib(self.total_bytes)} GiB")
        if self.cards:
            lines.append(line(self.cards))
        if self.saved_by_group:
            ranked = sorted(self.saved_by_group.items(), key=lambda item: -item[1])
            lines.append(
                "kept for the backward: " + ", ".join(f"{name} {_gib(size)}" for name, size in ranked if size >> 20)
            )
        lines += ["", *(f"- {reason}" for reason in self.reasons)]
        if self.advice:
            lines += ["", "one change at a time (peak; iteration):"]
            lines += [f"  {a.gib:+7.2f} GiB  {_change(a.seconds):>8}  {a.text}" for a in self.advice]
        rates = ", ".join(f"{name} {value:.4g}" for name, value in vars(self.settings.rates).items())
        speeds = f"rates measured on {self.settings.measured}" if self.settings.measured else "assumed rates"
        lines += ["", f"seconds are counted work over {speeds} ({rates}), not timings"]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes and seconds."""
        return {
            "settings": self.settings.as_dict(),
            "policy": self.policy,
            "gradient_sync": self.gradient_sync,
            "phases": [
                vars(phase) | {"bytes": phase.bytes, "timeline": [list(point) for point in phase.timeline]}
                for phase in self.phases
            ],
            "peak": {"phase": self.peak.name, "bytes": self.peak_bytes, "total_bytes": self.total_bytes},
            "margins": self.margins,
            "answer": sentence(self, self.cards) if self.cards else None,
            "cards": [vars(card) for card in self.cards],
            "saved_by_group": self.saved_by_group,
            "reasons": list(self.reasons),
            "advice": [vars(advice) for advice in self.advice],
        }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _seconds(seconds: float) -> str:
    """With two digits where it is little, so that small models do not take 0."""
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2g}" if seconds else "-"


def _change(share: float) -> str:
    """Of an iteration's seconds, in percent, or how many times as long it takes."""
    return f"{100 * share:+.1f} %" if share < 1 else f"x {1 + share:.1f}"


def _head(plan: Plan) -> str:
    s = plan.settings
    size = f"{s.frames} x {s.height} x {s.width}" if s.frames > 1 else f"{s.height} x {s.width}"
    base = "" if s.quantization == "none" else f" on {s.quantization}"
    trained = f"LoRA {s.lora}{base}" if s.lora else "full fine-tuning"
    shared = f", {s.strategy} over {s.fsdp} GPUs" if s.is_sharded else ""
    return f"{s.model}, {size}, {trained}, {s.dtypes}{shared}; checkpointing {plan.policy}; {s.capacity}"
