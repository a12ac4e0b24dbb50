"""Further plans beside one: other checkpoint policies, and which of them fits at which size."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..planning import cards, specs
from ..planning.cases import kinds_of, resolved
from ..planning.margins import limit as most_bytes
from ..planning.planner import Plan
from ..planning.planner import plan as planned
from ..planning.settings import GIB, Settings
from .words import capacity

# From nothing recomputed to everything, and inputs on the host.
LADDER = ("none", "attention", "full", "full, inputs on host")
# Shares of the plan's own size.
FRAMES = (0.5, 1.0, 1.5, 2.0, 2.5)
SIZES = (0.5, 0.75, 1.0, 1.25, 1.5)
MICRO_BATCHES = (1, 2, 4, 8, 16)


def with_policy(settings: Settings, policy: str, **changes: Any) -> Settings:
    """The same under another policy; block inputs that are not kept cannot wait on the host."""
    offload = tuple(what for what in settings.offload if policy != "none" or what != "block_inputs")
    return settings.changed(checkpointing=policy, **({"offload": offload} | changes))


class Point(NamedTuple):
    """A policy of the comparison: exact bytes at the peak, and seconds of an iteration."""

    label: str
    bytes: int
    seconds: float


def compared(settings: Settings) -> list[Point]:
    """Every policy, and `auto` on the usual devices and two between; what the model cannot have is left out."""
    count = sum(kind.blocks for kind in kinds_of(resolved(settings.model)))
    wanted = [(name, with_policy(settings, name)) for name in ("none", "full", "attention", "matmul")]
    for share in (0.25, 0.5, 0.75):
        if first := round(share * count):
            wanted.append((f"first:{first}", with_policy(settings, f"first:{first}")))
    found = list(_points(wanted))
    sizes = {point.label: point.bytes / GIB for point in found}
    low, high = sizes.get("full", 0.0), sizes.get("none", 0.0)
    budgets = {size for size in (*cards.SIZES.values(), settings.gpu_gib) if low < size < high}
    if len(budgets) < 3 and high > low:
        between = [float(f"{low + share * (high - low):.2g}") for share in (0.25, 0.6)]
        # Beside a card's they would say the same again.
        budgets |= {gib for gib in between if all(abs(gib / size - 1) > 0.05 for size in budgets)}
    return found + list(
        _points(
            [
                (f"auto, {capacity(gib, settings)}", with_policy(settings, "auto", gpu_gib=gib))
                for gib in sorted(budgets)
            ]
        )
    )


def _points(wanted: list[tuple[str, Settings]]) -> Iterator[Point]:
    for label, settings in wanted:
        try:
            found = planned(settings, advise=False)
        except ValueError:
            # A budget below the weights, or a policy that this model cannot have.
            continue
        yield Point(label, found.peak_bytes, found.seconds)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, by rising bytes."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, point.seconds)):
        if not best or point.seconds < best[-1].seconds:
            best.append(point)
    return best


class Cell(NamedTuple):
    """The cheapest policy at one size: its place on `LADDER` (inf: none fits), its name, and bytes at the peak."""

    level: float
    label: str
    bytes: float


def axes_of(settings: Settings) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """The settings of a map's columns (resolutions) and rows (frames of a video, or micro-batches of images)."""
    spec = resolved(settings.model)
    # A UNet halves its latents three times.
    least = [
        step * patch * (1 if kinds_of(spec) else 8)
        for step, patch in zip(spec.compression[1:], spec.patch[1:], strict=True)
    ]
    columns = []
    for share in SIZES:
        height, width = (
            max(1, round(share * size / unit)) * unit
            for size, unit in zip((settings.height, settings.width), least, strict=True)
        )
        columns.append({"height": height, "width": width})
    if settings.frames > 1:
        time, patch = spec.compression[0], spec.patch[0]
        latents = (settings.frames - 1) // time + 1
        counts = sorted({max(1, round(share * latents / patch)) * patch for share in FRAMES})
        return columns, [{"frames": (count - 1) * time + 1} for count in counts]
    return columns, [{"micro_batch": count} for count in MICRO_BATCHES if count <= settings.samples]


@dataclass(frozen=True)
class _Corner:
    """One planned size: samples of a replay call, tokens of a sample, and the peaks' budgets by policy and phase."""

    rows: int
    tokens: int
    budgets: dict[str, dict[str, dict[str, int]]]


def _extent(settings: Settings) -> tuple[int, int]:
    """Samples of a replay call, and tokens of one."""
    spec = resolved(settings.model)
    reference = settings.reference_height, settings.reference_width
    return settings.micro_batch, specs.tokens(spec, settings.frames, settings.height, settings.width, reference)


def _corner(settings: Settings, names: Sequence[str]) -> _Corner:
    budgets = {}
    for name in names:
        offload = tuple(dict.fromkeys((*settings.offload, "block_inputs")))
        changed = (
            settings.changed(checkpointing="full", offload=offload)
            if name == LADDER[3]
            else with_policy(settings, name)
        )
        budgets[name] = {phase.name: phase.budget for phase in planned(changed, advise=False).phases}
    return _Corner(*_extent(settings), budgets)


def _between(corners: Sequence[_Corner], settings: Settings, name: str) -> dict[str, float]:
    """Peaks by phase at one size.

    Trajectories and what is no replay are linear between the planned tokens; the rest of a replay is
    `a + rows (b + c tokens)`.
    """
    rows, tokens = _extent(settings)
    corners = sorted(corners, key=lambda corner: corner.tokens)
    known = np.array([corner.tokens for corner in corners])
    places = np.array([[1.0, c.rows, c.rows * c.tokens] for c in corners])
    exact = len(corners) == np.linalg.matrix_rank(places) == 3

    found = {}
    for phase in corners[0].budgets[name]:
        budgets = [corner.budgets[name][phase] for corner in corners]
        paths = np.array([budget.get("trajectories", 0) for budget in budgets])
        rest = np.array([sum(budget.values()) for budget in budgets]) - paths
        if phase.startswith("replay") and exact:
            size = np.linalg.solve(places, rest) @ [1.0, rows, rows * tokens]
        else:
            size = np.interp(tokens, known, rest)
        found[phase] = float(size + np.interp(tokens, known, paths))
    return found


def cell(corners: Sequence[_Corner], settings: Settings, limit: float, names: Sequence[str]) -> Cell:
    """The cheapest of the policies under a limit in bytes, from none to all blocks under the next one.

    Blocks count as equal: of a mixture a block has its share of the difference between two whole policies.
    """
    blocks = sum(kind.blocks for kind in kinds_of(resolved(settings.model))) or 1
    peaks = [_between(corners, settings, name) for name in names]
    size = 0.0
    for i, (name, here) in enumerate(zip(names, peaks, strict=True)):
        before = peaks[max(i - 1, 0)]
        # Inputs wait on the host for all blocks or none.
        for k in range(1, blocks + 1) if i in (1, 2) else (blocks,):
            share = k / blocks
            size = max(share * here[phase] + (1 - share) * before[phase] for phase in here)
            if size <= limit:
                label = name if k == blocks else f"{name} {k}/{blocks}"
                return Cell(i - 1 + share if i else 0.0, label, size)
    return Cell(math.inf, "no", size)


def cells(plan: Plan) -> tuple[list[dict[str, int]], list[dict[str, int]], list[list[Cell]]]:
    """Columns and rows of the map, and its cells, row by row.

    Raises:
        ValueError: a size that the model cannot have.
    """
    settings = plan.settings
    columns, rows = axes_of(settings)
    limit = most_bytes(settings, settings.gpu_gib)
    grid = [[settings.changed(**row, **column) for column in columns] for row in rows]
    planned_at = list(dict.fromkeys((grid[0][0], settings, grid[-1][-1])))
    names = list(LADDER[:3])
    corners = [_corner(at, names) for at in planned_at]
    found = [[cell(corners, at, limit, names) for at in line] for line in grid]
    if kinds_of(resolved(settings.model)) and any(math.isinf(c.level) for line in found for c in line):
        hosts = [_corner(at, LADDER[3:]) for at in planned_at]
        corners = [_Corner(c.rows, c.tokens, c.budgets | h.budgets) for c, h in zip(corners, hosts, strict=True)]
        names = list(LADDER)
        found = [[cell(corners, at, limit, names) for at in line] for line in grid]
    return columns, rows, found
