"""Pictures of a plan: an iteration's timeline, policies compared, what is kept, and what fits at which size."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ._comparisons import LADDER, Cell, cells, compared, front, with_policy
from ._labels import place
from .planner import CAPACITIES, CATEGORIES, Phase, Plan
from .planner import plan as planned
from .settings import GIB, Settings

# Neighbours in the stack differ in lightness, and all can be told apart by the colour-blind.
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
# Of `LADDER`.
SHADES = ("#fdf1e4", "#f5bd8a", "#d9642c", "#7a2e0e")
UNFIT = "#d5d9de"
STYLE = {"font.size": 8.0, "svg.fonttype": "none", "svg.hashsalt": "plan", "hatch.linewidth": 0.5}
DPI = 200
WIDTH = 5.4
# Phases that take no time to speak of are drawn this wide, so that they are seen.
LEAST_WIDTH = 0.075


def draw(plan: Plan, folder: str | Path) -> list[Path]:
    """Draws all pictures into a folder, each as PNG and as SVG; further plans are made for all but the first.

    Args:
        plan: what `plan` found.
        folder: made if it is not there; "timeline", "policies", "saved" and "sizes" are written in it.

    Returns:
        The files.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with matplotlib.rc_context(STYLE):
        for name, picture in (("timeline", timeline), ("policies", policies), ("saved", saved), ("sizes", sizes)):
            figure = picture(plan)
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                found.append(folder / f"{name}.{kind}")
                figure.savefig(found[-1], dpi=DPI, metadata=metadata)
    return found


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    return figure, panel


def _title(panel: Any, text: str, pad: float = 6.0, letters: int = 76) -> None:
    """Over the panel, in lines of at most so many letters."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, letters)]
    panel.set_title("\n".join(lines), loc="left", fontsize=8, pad=pad)


def _subject(settings: Settings, *, size: bool = True) -> str:
    """The run in a line."""
    pixels = f"{settings.height} x {settings.width}"
    frames = f"{settings.frames} frames, " if settings.frames > 1 else ""
    trained = f"LoRA {settings.lora}" if settings.lora else "full fine-tuning"
    shared = f", {settings.strategy} over {settings.fsdp} GPUs" if settings.is_sharded else ""
    return f"{Path(settings.model).name}, {f'{frames}{pixels}, ' if size else ''}{trained}, {settings.dtype}{shared}"


def _short(policy: str) -> str:
    """`15 x attention, 5 x none, 25 x attention` with each policy named once."""
    counts: Counter[str] = Counter()
    for part in policy.split(", "):
        count, times, name = part.partition(" x ")
        if not times:
            return policy
        counts[name] += int(count)
    return " + ".join(f"{count} x {name}" for name, count in counts.items())


def _margins(plan: Plan) -> float:
    return sum(plan.margins.values()) / GIB


# The timeline.


def _line(phases: Sequence[Phase]) -> tuple[list[float], list[dict[str, int]], list[float]]:
    """Places and bytes of all moments, and where phases end; the whole is 1 wide."""
    total = sum(phase.seconds for phase in phases) or 1.0
    widths = [max(phase.seconds / total, LEAST_WIDTH) for phase in phases]
    ends, places, budgets = [0.0], [], []
    for phase, width in zip(phases, widths, strict=True):
        start, width = ends[-1], width / sum(widths)
        moments = sorted(phase.timeline, key=lambda moment: moment[0]) or [(0.5, phase.budget)]
        for at, budget in ((0.0, moments[0][1]), *moments, (1.0, moments[-1][1])):
            places.append(start + at * width)
            budgets.append(budget)
        ends.append(start + width)
    return places, budgets, ends


def _capacities(plan: Plan, most: float) -> list[float]:
    """GiB of the devices up to the first that holds so much, and of the one that was given."""
    sizes = sorted({*map(float, CAPACITIES), plan.settings.gpu_gib})
    holding = [size for size in sizes if size >= most]
    return [size for size in sizes if size <= max(holding[:1], default=most) or size == plan.settings.gpu_gib]


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s" if seconds >= 0.05 else "< 0.1 s"


def timeline(plan: Plan) -> Any:
    """Bytes by category over one iteration; a call of a phase stands for all of its calls."""
    figure, panel = _figure(4.0)
    places, budgets, ends = _line(plan.phases)
    shown = [name for name in CATEGORIES if any(budget.get(name) for budget in budgets)]
    panel.stackplot(
        places,
        [[budget.get(name, 0) / GIB for budget in budgets] for name in shown],
        colors=[COLOURS[name] for name in shown],
        labels=shown,
        step="mid",
        linewidth=0,
    )
    peak = plan.peak
    top = peak.bytes / GIB
    sizes = _capacities(plan, top)
    highest = max(top * 1.28, sizes[-1] * 1.26 if sizes[-1] < 1.25 * top else sizes[-1] * 1.08)
    _capacity_lines(plan, panel, sizes, across=True)
    panel.set_xlim(0, 1)
    panel.set_ylim(0, highest)
    for end in ends[1:-1]:
        panel.axvline(end, color="white", linewidth=1.0, zorder=1.5)
    centres = [(a + b) / 2 for a, b in pairwise(ends)]
    names = [phase.name + (f", {_seconds(phase.seconds)}" if phase.seconds else "") for phase in plan.phases]
    panel.set_xticks(centres, names, rotation=32, ha="right", rotation_mode="anchor")
    panel.tick_params(axis="x", length=0)
    panel.set_ylabel("GiB")
    _mark_peak(panel, peak, places, budgets, sizes)
    _title(
        panel,
        f"{_subject(plan.settings)}\npolicy {_short(plan.policy)}\nwidths: predicted seconds, short phases widened",
    )
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=5, frameon=False, fontsize=7, handlelength=1.2
    )
    return figure


def _mark_peak(
    panel: Any, peak: Phase, places: list[float], budgets: list[dict[str, int]], sizes: Sequence[float]
) -> None:
    """A dot, and above it what runs there, where no capacity line is crossed."""
    where = next((p for p, b in zip(places, budgets, strict=True) if sum(b.values()) == peak.bytes), 0.5)
    top, highest = peak.bytes / GIB, panel.get_ylim()[1]
    text = f"peak {top:.1f} GiB, {peak.name}\n{peak.op}" + (f"\n{peak.module}" if peak.module else "")
    tall = 0.17 * highest
    low = top + 0.02 * highest
    free = [low, *(size + 0.01 * highest for size in sizes if size >= low)]
    bottom = next((y for y in free if y + tall < highest and not any(y - 1e-9 < s < y + tall for s in sizes)), None)
    left = where > 0.5
    panel.plot(where, top, "o", color="black", markersize=3.5, clip_on=False, zorder=5)
    panel.annotate(
        text,
        (where, top),
        (where - 0.05 if left else where + 0.05, low if bottom is None else bottom),
        ha="right" if left else "left",
        va="bottom",
        fontsize=7,
        arrowprops={"arrowstyle": "-", "linewidth": 0.7, "shrinkB": 2},
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        zorder=6,
    )


def _capacity_lines(plan: Plan, panel: Any, sizes: Sequence[float], *, across: bool) -> None:
    """Dashed; the given one is heavier, with the margins shaded below it."""
    gpu = plan.settings.gpu_gib
    for size in sizes:
        mine = size == gpu
        look = {"color": "#222222" if mine else "#777777", "linewidth": 1.2 if mine else 0.8, "linestyle": (0, (4, 2))}
        if across:
            panel.axhline(size, **look)
            spot, offset, where = (0.0, size), (3, 1.5), {"ha": "left", "va": "bottom"}
        else:
            panel.axvline(size, **look)
            spot, offset, where = (size, 1.0), (0, 2), {"ha": "center", "va": "bottom"}
        coordinates = panel.get_yaxis_transform() if across else panel.get_xaxis_transform()
        panel.annotate(
            f"{size:g} GiB",
            spot,
            offset,
            xycoords=coordinates,
            textcoords="offset points",
            fontsize=7,
            color=look["color"],
            fontweight="bold" if mine else "normal",
            annotation_clip=False,
            **where,
        )
    if gpu in sizes:
        (panel.axhspan if across else panel.axvspan)(
            gpu - _margins(plan), gpu, color="#222222", alpha=0.12, linewidth=0
        )


# Policies.


def policies(plan: Plan) -> Any:
    """Seconds of an iteration against its peak for every policy."""
    figure, panel = _figure(3.6)
    points = compared(plan.settings)
    merged: dict[tuple[int, float], list[str]] = {}
    for point in points:
        merged.setdefault((point.bytes, point.seconds), []).append(point.label)
    best = front(points)
    panel.plot(
        [p.bytes / GIB for p in best], [p.seconds for p in best], color=COLOURS["saved"], linewidth=1.1, zorder=2
    )
    for (size, seconds), labels in merged.items():
        automatic = all(label.startswith("auto") for label in labels)
        optimal = any(p.label in labels for p in best)
        colour = COLOURS["saved"] if optimal else COLOURS["parameters"]
        panel.plot(size / GIB, seconds, "D" if automatic else "o", color=colour, markersize=4.5, zorder=3)
    panel.plot(plan.peak_bytes / GIB, plan.seconds, "o", markersize=10, markerfacecolor="none", color="black", zorder=4)
    left, right = min(p.bytes for p in points) / GIB, max(p.bytes for p in points) / GIB
    gpu = plan.settings.gpu_gib
    sizes = [size for size in _capacities(plan, right) if 0.85 * left <= size <= max(1.4 * right, right + 8)]
    right = max([right, *sizes])
    panel.set_xlim(left - 0.08 * (right - left), right + 0.08 * (right - left))
    panel.margins(y=0.14)
    _capacity_lines(plan, panel, sizes, across=False)
    panel.grid(axis="y", alpha=0.3)
    given = "margins of the given GPU are shaded" if gpu in sizes else f"{gpu:g} GiB are given"
    panel.set_xlabel(f"peak of the iteration, GiB (exact; {given})")
    panel.set_ylabel("predicted seconds of an iteration")
    _title(
        panel, f"{_subject(plan.settings)}\ncircled: this plan; line: none is better in both; auto n: for n GiB", pad=14
    )
    figure.draw_without_rendering()
    lines = [((size, low), (size, high)) for size in sizes for low, high in [panel.get_ylim()]]
    lines += [((a.bytes / GIB, a.seconds), (b.bytes / GIB, b.seconds)) for a, b in pairwise(best)]
    texts = [((size / GIB, seconds), ", ".join(labels)) for (size, seconds), labels in merged.items()]
    place(figure, panel, texts, lines)
    return figure


# What is kept.


def saved(plan: Plan) -> Any:
    """What the replay's forward keeps without checkpointing, by op group, with and without block ops."""
    mode = plan.settings.block_ops if plan.settings.block_ops != "off" else "lossless"
    bars: list[tuple[str, dict[str, int], str]] = []
    for label, ops, recompute, colour in (
        ("diffusers", "off", "none", "#9aa5b1"),
        (f"block ops {mode}, recompute gelu", mode, "gelu", "#e8935a"),
        (f"block ops {mode}, recompute all", mode, "all", "#c9521c"),
    ):
        changed = with_policy(plan.settings, "none", block_ops=ops, recompute=recompute)
        try:
            found = planned(changed, advise=False)
        except ValueError:
            # This model has no block ops.
            continue
        bars.append((label, found.saved_by_group, colour))
    groups = sorted(
        {name for _, sizes, _ in bars for name in sizes}, key=lambda name: -max(s.get(name, 0) for _, s, _ in bars)
    )
    groups = [name for name in groups if any(sizes.get(name, 0) >> 20 for _, sizes, _ in bars)]
    figure, panel = _figure(0.15 * len(groups) * len(bars) + 1.5)
    thick = 0.8 / len(bars)
    for i, (label, sizes, colour) in enumerate(bars):
        shift = thick * (i - (len(bars) - 1) / 2)
        values = [sizes.get(name, 0) / GIB for name in groups]
        panel.barh(
            [y + shift for y in range(len(groups))],
            values,
            0.9 * thick,
            color=colour,
            label=f"{label}: {sum(sizes.values()) / GIB:.1f} GiB",
        )
        for y, value in enumerate(values):
            text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
            panel.annotate(text, (value, y + shift), (3, 0), textcoords="offset points", va="center", fontsize=7)
    panel.set_yticks(range(len(groups)), groups)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(groups) - 0.45, -0.55)
    panel.margins(x=0.1)
    panel.grid(axis="x", alpha=0.3)
    panel.set_xlabel("kept for the backward, GiB, by the group of the operators that made it")
    _title(panel, f"{_subject(plan.settings)}\nwithout checkpointing")
    panel.legend(frameon=False, loc="lower right")
    return figure


# Sizes.


def sizes(plan: Plan) -> Any:
    """The cheapest policy that fits the given GPU, by frames (or micro-batch) and resolution."""
    return _draw_map(plan, *cells(plan))


def _draw_map(plan: Plan, columns: list[dict[str, int]], rows: list[dict[str, int]], cells: list[list[Cell]]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    shades = LinearSegmentedColormap.from_list("recomputation", SHADES)
    figure, panel = _figure(0.5 * len(rows) + 1.35)
    for y, line in enumerate(cells):
        for x, found in enumerate(line):
            fits = math.isfinite(found.level)
            colour = shades(found.level / 3) if fits else UNFIT
            panel.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", hatch=None if fits else "////")
            )
            name = found.label.replace(", ", ",\n").replace(" ", "\n" if "/" in found.label else " ")
            panel.text(
                x,
                y,
                f"{name}\n{found.bytes / GIB:.1f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if fits and found.level > 1.7 else "black",
            )
    panel.set_xlim(-0.5, len(columns) - 0.5)
    panel.set_ylim(-0.5, len(rows) - 0.5)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_xticks(range(len(columns)), [f"{c['height']} x {c['width']}" for c in columns])
    name = next(iter(rows[0]))
    panel.set_yticks(range(len(rows)), [f"{row[name]}" for row in rows])
    panel.set_ylabel(name.replace("_", "-"))
    panel.set_xlabel("height x width")
    s = plan.settings
    _title(
        panel,
        f"{_subject(s, size=False)}: cheapest of {', '.join(LADDER[:3])} that fits {s.gpu_gib:g} GiB\n"
        f"k/n: so many blocks, the rest one step cheaper; peak in GiB, margins of {_margins(plan):.1f} beside it\n"
        "three sizes are planned, those between are interpolated; blocks count as equal",
        letters=90,
    )
    return figure
