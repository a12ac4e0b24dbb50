"""Bytes, planned or measured, as a picture: by category over the phases of an iteration, and by group of operators."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ...drawing import figure
from ..planning.budget import CATEGORIES

# Of the categories: neighbours in the stack differ in lightness, and all can be told apart by the colour-blind.
COLOURS = {
    "parameters": "#4f6d8f",
    "unsharded block": "#a9c3dd",
    "gradients": "#f2d16b",
    "optimizer": "#8a7a3c",
    "master weights": "#2f4358",
    "block inputs": "#7fc8b0",
    "saved": "#d9642c",
    "recomputation": "#f2b48a",
    "temporaries": "#5d3a6e",
    "workspace": "#c9a3cf",
    "trajectories": "#2b8a7e",
    "other models": "#b5bcc4",
    "replica": "#7d8790",
}
# Phases that take no time to speak of are drawn this wide, so that they are seen.
LEAST_WIDTH = 0.075
# Of the panel's height, what lies below a cut.
BELOW = 0.14


class Strip(NamedTuple):
    """One phase: (share of it that has passed, bytes by category) at some moments, at least one."""

    name: str
    seconds: float
    moments: Sequence[tuple[float, Mapping[str, int]]]


@dataclass(frozen=True)
class Drawn:
    """A stack on its panel.

    Attributes:
        figure, panel: of it.
        unit: bytes of one on the y axis.
        places, budgets: of all moments; the whole is 1 wide.
        ends: of the phases, from 0 to 1.
    """

    figure: Any
    panel: Any
    unit: int
    places: list[float]
    budgets: list[Mapping[str, int]]
    ends: list[float]

    @property
    def tops(self) -> list[float]:
        """Of all moments, in units."""
        return [sum(budget.values()) / self.unit for budget in self.budgets]


def line(strips: Sequence[Strip]) -> tuple[list[float], list[Mapping[str, int]], list[float]]:
    """Places and bytes of all moments, and where phases end; the whole is 1 wide."""
    total = sum(strip.seconds for strip in strips) or 1.0
    widths = [max(strip.seconds / total, LEAST_WIDTH) for strip in strips]
    ends, places, budgets = [0.0], [], []
    for strip, width in zip(strips, widths, strict=True):
        start, width = ends[-1], width / sum(widths)
        moments = sorted(strip.moments, key=lambda moment: moment[0])
        for at, budget in ((0.0, moments[0][1]), *moments, (1.0, moments[-1][1])):
            places.append(start + at * width)
            budgets.append(budget)
        ends.append(start + width)
    return places, budgets, ends


def seconds(count: float) -> str:
    """With as many digits as matter."""
    return f"{count:.0f} s" if count >= 9.5 else f"{count:.1f} s" if count >= 0.05 else "< 0.1 s"


def stacked(strips: Sequence[Strip], unit: tuple[int, str]) -> Drawn:
    """Draws the stack with the phases' names below it; the y axis ends at its top.

    Args:
        strips: in the order of time.
        unit: bytes of one on the y axis, and its name.
    """
    drawn, panel = figure(4.0)
    found = Drawn(drawn, panel, unit[0], *line(strips))
    shown = [name for name in CATEGORIES if any(budget.get(name) for budget in found.budgets)]
    panel.stackplot(
        found.places,
        [[budget.get(name, 0) / unit[0] for budget in found.budgets] for name in shown],
        colors=[COLOURS[name] for name in shown],
        labels=shown,
        step="mid",
        linewidth=0,
    )
    panel.set_xlim(0, 1)
    panel.set_ylim(0, max(found.tops) * 1.05)
    for end in found.ends[1:-1]:
        around = [top for place, top in zip(found.places, found.tops, strict=True) if abs(place - end) < 1e-9]
        panel.vlines(end, 0, max(around), color="white", linewidth=1.0, zorder=1.5)
    centres = [(a + b) / 2 for a, b in pairwise(found.ends)]
    names = [strip.name + (f", {seconds(strip.seconds)}" if strip.seconds else "") for strip in strips]
    panel.set_xticks(centres, names, rotation=32, ha="right", rotation_mode="anchor")
    panel.tick_params(axis="x", length=0)
    panel.set_ylabel(unit[1])
    return found


def cut(drawn: Drawn, floor: float) -> None:
    """Draws what lies below so many units low, so that there is room for what lies above, and says so.

    Args:
        drawn: its y axis ends where it shall.
        floor: in units.
    """
    import numpy as np
    from matplotlib.ticker import FixedLocator, MaxNLocator

    panel = drawn.panel
    top = panel.get_ylim()[1]
    marks, heights = (0.0, floor, top), (0.0, BELOW, 1.0)

    def along(start: Sequence[float], end: Sequence[float]) -> Any:
        # Straight on beyond the ends, which matplotlib asks for.
        slope = (end[2] - end[1]) / (start[2] - start[1])
        return lambda x: np.where(x > start[2], end[2] + (x - start[2]) * slope, np.interp(x, start, end))

    panel.set_yscale("function", functions=(along(marks, heights), along(heights, marks)))
    panel.set_ylim(0, top)
    above = [tick for tick in MaxNLocator(6).tick_values(floor, top) if floor < tick <= top]
    panel.yaxis.set_major_locator(FixedLocator([0.0, *above]))
    panel.axhline(floor, color="white", linewidth=3.5, zorder=2.5)
    panel.axhline(floor, color="#555555", linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=2.6)
    stroke = {"color": "black", "linewidth": 0.8, "clip_on": False, "transform": panel.transAxes, "zorder": 6}
    for y in (BELOW - 0.012, BELOW + 0.012):
        panel.plot([-0.012, 0.012], [y - 0.012, y + 0.012], **stroke)
    panel.text(
        0.5,
        BELOW / 2,
        f"cut: below {floor:.3g} {'GiB' if drawn.unit == 1 << 30 else 'MiB'} the axis is pressed together",
        transform=panel.transAxes,
        ha="center",
        va="center",
        fontsize=7,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        zorder=4,
    )


def legend(drawn: Drawn) -> None:
    """Below the panel, from the top of the stack."""
    handles, labels = drawn.panel.get_legend_handles_labels()
    drawn.figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=5, handlelength=1.2)


def mark_peak(drawn: Drawn) -> None:
    """A dot at the highest moment."""
    top = max(drawn.tops)
    where = drawn.places[drawn.tops.index(top)]
    drawn.panel.plot(where, top, "o", color="black", markersize=3.5, clip_on=False, zorder=5, label="peak")


def bars(
    groups: Sequence[str], rows: Sequence[tuple[str, Mapping[str, int], str]], unit: tuple[int, str]
) -> tuple[Any, Any]:
    """A figure with a bar for each group and each (label, bytes by group, colour).

    Args:
        groups: from the top.
        rows: side by side in each group.
        unit: bytes of one, and its name.
    """
    size, name = unit
    drawn, panel = figure(0.15 * len(groups) * len(rows) + 1.5)
    thick = 0.8 / len(rows)
    for i, (label, sizes, colour) in enumerate(rows):
        shift = thick * (i - (len(rows) - 1) / 2)
        values = [sizes.get(group, 0) / size for group in groups]
        total = f"{label}: {sum(sizes.values()) / size:.3g} {name}"
        row = panel.barh([y + shift for y in range(len(groups))], values, 0.9 * thick, color=colour, label=total)
        texts = [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values]
        panel.bar_label(row, texts, padding=3, fontsize=7)
    panel.set_yticks(range(len(groups)), groups)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(groups) - 0.45, -0.55)
    panel.margins(x=0.1)
    panel.grid(axis="x")
    panel.set_xlabel(f"kept for the backward, {name}, by the group of the operators that made it")
    panel.legend(loc="lower right")
    return drawn, panel
