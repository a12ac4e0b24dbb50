"""Pictures of a profile, as of a plan: the timeline with the predicted peaks, and what is kept."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..drawing import title, write
from ..memory.pictures.timeline import COLOURS, Drawn, Strip, bars, legend, mark_peak, stacked

if TYPE_CHECKING:
    from .profiler import Report, Row

GIB, MIB = 2**30, 2**20
# Dashes over the stack: their colours and patterns.
PREDICTED, ALLOCATED = ("black", (0, (2.2, 1.2))), ("#8a1c1c", (0, (0.8, 0.8)))


def unit_of(report: "Report") -> tuple[int, str]:
    """In which a report's bytes are shown, and its name."""
    return (GIB, "GiB") if report.peak.bytes >= GIB else (MIB, "MiB")


def draw(report: "Report", folder: str | Path) -> list[Path]:
    """Draws "timeline", and "saved" where something was kept for a backward, each as PNG and as SVG.

    Raises:
        OSError: the folder cannot be written.
        ValueError: nothing was measured.
    """
    pictures = {"timeline": partial(timeline, report)}
    if _most_saved(report).saved_by_group:
        pictures["saved"] = partial(saved, report)
    return write(folder, pictures)


def _rows(report: "Report") -> list["Row"]:
    """Phases with a piece that took memory; what ran in none is last."""
    return sorted((row for row in report.rows.values() if row.timeline), key=lambda row: row.name == "other")


def _head(report: "Report") -> str:
    return f"{report.title}, measured on {report.device}" if report.title else f"measured on {report.device}"


def timeline(report: "Report") -> Any:
    """Bytes by category; of each phase its piece with the most bytes, which stands for all of them."""
    rows = _rows(report)
    unit = unit_of(report)
    drawn = stacked([Strip(row.name, row.seconds, row.timeline) for row in rows], unit)
    predicted = {name: sum(budget.values()) for name, budget in report.predicted.items()}
    allocated = {row.name: row.allocated for row in rows if row.allocated is not None}
    # What stands above the stack, in each phase.
    heights = [0.0] * len(rows)
    _dashes(drawn, rows, predicted, "predicted peak", PREDICTED, heights)
    _dashes(drawn, rows, allocated, "max_memory_allocated", ALLOCATED, heights)
    low, high = drawn.panel.get_ylim()
    drawn.panel.set_ylim(low, max(high, 1.05 * max(heights)))
    if report.predicted:
        _deviations(report, drawn, rows, heights)
    missing = [row.name for row in rows if row.name not in predicted and row.name != "other"]
    notes = ["widths: measured seconds, short phases widened"]
    if report.predicted and missing:
        notes.append(f"not predicted: {', '.join(missing)}")
    peak = report.peak
    said = filter(None, (f"peak {peak.bytes / unit[0]:.1f} {unit[1]}", peak.name, peak.op, peak.module))
    title(drawn.panel, _head(report), ", ".join(said), *notes)
    mark_peak(drawn)
    legend(drawn)
    return drawn.figure


def _dashes(
    drawn: Drawn,
    rows: list["Row"],
    sizes: Mapping[str, int],
    label: str,
    look: tuple[str, Any],
    heights: list[float],
) -> None:
    """Across each phase that has a size; raises `heights` to them."""
    from matplotlib.patheffects import Stroke, withStroke

    lines = []
    for i, row in enumerate(rows):
        if row.name in sizes:
            height = sizes[row.name] / drawn.unit
            heights[i] = max(heights[i], height, row.bytes / drawn.unit)
            lines.append((height, drawn.ends[i] + 0.004, drawn.ends[i + 1] - 0.004))
    if not lines:
        return
    found = drawn.panel.hlines(*zip(*lines, strict=True), color=look[0], linestyle=look[1], linewidth=1.3, label=label)
    # A light edge, so that it can be seen on every colour.
    effects: list[Stroke] = [withStroke(linewidth=2.6, foreground="white", alpha=0.75)]
    found.set(path_effects=effects, zorder=3)


def _deviations(report: "Report", drawn: Drawn, rows: list["Row"], heights: list[float]) -> None:
    for i, row in enumerate(rows):
        off = report.deviation(row.name)
        if off is not None:
            middle = (drawn.ends[i] + drawn.ends[i + 1]) / 2
            where = (middle, heights[i])
            text = f"{off:+.1%}".replace("-0.0", "0.0").replace("+0.0", "0.0")
            drawn.panel.annotate(
                text, where, (0, 2.5), textcoords="offset points", ha="center", va="bottom", fontsize=6, zorder=4
            )


def _most_saved(report: "Report") -> "Row":
    return max(report.rows.values(), key=lambda row: sum(row.saved_by_group.values()), default=report.peak)


def saved(report: "Report") -> Any:
    """What is kept for the backward where most is, by op group."""
    row, unit = _most_saved(report), unit_of(report)
    sizes = dict(row.saved_by_group)
    if inputs := row.budget.get("block inputs"):
        sizes["block inputs"] = inputs
    most = max(sizes.values())
    groups = [name for name in sorted(sizes, key=lambda name: -sizes[name]) if sizes[name] > most / 1000]
    drawn, panel = bars(groups, [(row.name, sizes, COLOURS["saved"])], unit)
    title(panel, _head(report), f"at the peak of the {row.name}")
    return drawn
