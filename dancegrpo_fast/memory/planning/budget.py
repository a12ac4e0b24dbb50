"""What a plan is: phases with bytes by category."""

from dataclasses import dataclass
from typing import Any

from .settings import GIB, Settings

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
CAPACITIES = (24, 40, 80, 141)


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
    """

    settings: Settings
    phases: tuple[Phase, ...]
    margins: dict[str, int]
    saved_by_group: dict[str, int]
    policy: str
    reasons: tuple[str, ...]
    advice: tuple[Advice, ...] = ()

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
        """As text: phases by categories in GiB."""
        from .report import table

        return table(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes and seconds."""
        from .report import as_dict

        return as_dict(self)
