"""Bytes by category over the phases of one iteration, planned or measured, as a picture."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ..planning.budget import CATEGORIES
from .drawing import COLOURS, figure
from .labels import above

# Phases that take no time to speak of are drawn this wide, so that they are seen.
LEAST_WIDTH = 0.075


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


def legend(drawn: Drawn) -> None:
    """Below the panel, from the top of the stack."""
    handles, labels = drawn.panel.get_legend_handles_labels()
    drawn.figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=5, frameon=False, fontsize=7, handlelength=1.2
    )


def mark_peak(
    drawn: Drawn, text: str, module: str, *, tops: Sequence[float], bands: Sequence[tuple[float, float]] = ()
) -> None:
    """A dot at the highest moment, and near it, where nothing else is, what runs there.

    Args:
        drawn: with its title and legend.
        text: of the label; the module comes below it.
        module: its path, or "".
        tops: of all moments with what is drawn above them, in units.
        bands: (from, to) in units, where no label may be.
    """
    top = max(drawn.tops)
    where = drawn.places[drawn.tops.index(top)]
    drawn.panel.plot(where, top, "o", color="black", markersize=3.5, clip_on=False, zorder=5)
    parts = textwrap.wrap(module.replace(".", ". "), 52)
    whole = "\n".join([text, *(part.replace(". ", ".") for part in parts)])
    above(drawn.figure, drawn.panel, whole, (where, top), list(zip(drawn.places, tops, strict=True)), bands)
