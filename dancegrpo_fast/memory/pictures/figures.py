"""Pictures of a plan: an iteration's timeline, policies compared, what is kept, what fits at which size and card."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...drawing import figure, title, write
from ..planning.cards import SIZES
from ..planning.planner import Plan
from ..planning.planner import plan as planned
from ..planning.settings import GIB
from ..planning.verdict import shortened
from .comparisons import LADDER, Cell, Point, cells, compared, front, with_policy
from .labels import place, together
from .timeline import COLOURS, Strip, bars, cut, legend, mark_peak, stacked
from .which_card import which_card
from .words import capacity, given, margins, subject, verdict

# Of `LADDER`.
SHADES = ("#fdf1e4", "#f5bd8a", "#d9642c", "#7a2e0e")
UNFIT = "#d5d9de"
# Of the timeline's height: where what rests takes more, it is cut.
WALL = 0.4


def draw(plan: Plan, folder: str | Path) -> list[Path]:
    """Draws all pictures into a folder, each as PNG and as SVG; further plans are made for all but the first.

    Args:
        plan: what `plan` found.
        folder: made if it is not there; "timeline", "policies", "saved", "sizes" and "cards" are written in it.

    Returns:
        The files.

    Raises:
        OSError: the folder cannot be written.
    """
    pictures = {"timeline": timeline, "policies": policies, "saved": saved, "sizes": sizes, "cards": which_card}
    return write(folder, {name: partial(picture, plan) for name, picture in pictures.items()})


# The timeline.


def _capacities(plan: Plan, most: float) -> list[float]:
    """GiB of the devices up to the first that holds so much, and of the one that was given."""
    sizes = sorted({*SIZES.values(), plan.settings.gpu_gib})
    holding = [size for size in sizes if size >= most]
    return [size for size in sizes if size <= max(holding[:1], default=most) or size == plan.settings.gpu_gib]


def timeline(plan: Plan) -> Any:
    """Bytes by category over one iteration; a call of a phase stands for all of its calls."""
    drawn = stacked([Strip(p.name, p.seconds, p.timeline or ((0.5, p.budget),)) for p in plan.phases], (GIB, "GiB"))
    peak, panel = plan.peak, drawn.panel
    most = max(drawn.tops)
    sizes = _capacities(plan, most)
    panel.set_ylim(0, max(1.05 * most, 1.03 * sizes[-1]))
    rests, top = _rests(plan), panel.get_ylim()[1]
    if rests > WALL * top:
        floor = rests - 0.04 * (top - rests)
        sizes = [size for size in sizes if size > floor]
        cut(drawn, floor)
    _capacity_lines(plan, panel, sizes, across=True)
    title(
        panel,
        subject(plan.settings),
        verdict(plan),
        f"policy {shortened(plan.policy)}",
        ", ".join(filter(None, (f"peak {most:.1f} GiB", peak.name, peak.op, peak.module))),
        "widths: predicted seconds, short phases widened; shaded: margins",
    )
    mark_peak(drawn)
    legend(drawn)
    return drawn.figure


def _rests(plan: Plan) -> float:
    """GiB that rest before anything runs."""
    return next(phase.bytes for phase in plan.phases if phase.name == "weights") / GIB


def _capacity_lines(plan: Plan, panel: Any, sizes: Sequence[float], *, across: bool) -> None:
    """Dashed, named beside the panel; the given one is heavier, with the margins shaded below it."""
    gpu, last = plan.settings.gpu_gib, [float("-inf")] * 2
    for size in sorted(sizes):
        mine = size == gpu
        look = {"color": "#222222" if mine else "#777777", "linewidth": 1.2 if mine else 0.8, "linestyle": (0, (4, 2))}
        (panel.axhline if across else panel.axvline)(size, **look)
        name = capacity(size, plan.settings)
        note = panel.annotate(
            f"{name}\n{size:g} GiB" if mine and across and plan.settings.card else name,
            (1.0, size) if across else (size, 1.0),
            (3, 0) if across else (0, 2),
            xycoords=panel.get_yaxis_transform() if across else panel.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=7,
            color=look["color"],
            fontweight="bold" if mine else "normal",
            annotation_clip=False,
            ha="left" if across else "center",
            va="center" if across else "bottom",
        )
        if not across:
            # In a second line where it would lie on the one before it.
            box = note.get_window_extent()
            row = 0 if box.x0 > last[0] + 4 else 1
            note.set_position((0, 2 + 9 * row))
            last[row] = box.x1
    if gpu in sizes:
        (panel.axhspan if across else panel.axvspan)(gpu - margins(plan), gpu, color="#222222", alpha=0.12, linewidth=0)


# Policies.


def policies(plan: Plan) -> Any:
    """Seconds of an iteration against its peak for every policy."""
    return _draw_policies(plan, compared(plan.settings))


def _draw_policies(plan: Plan, points: Sequence[Point]) -> Any:
    drawn, panel = figure(4.2)
    merged: dict[tuple[int, float], list[str]] = {}
    for point in points:
        merged.setdefault((point.bytes, point.seconds), []).append(point.label)
    best = front(points)
    panel.plot(
        [p.bytes / GIB for p in best],
        [p.seconds for p in best],
        color=COLOURS["saved"],
        linewidth=1.1,
        zorder=2,
        label="the best: less memory only for more time",
    )
    for (size, seconds), labels in merged.items():
        automatic = all(label.startswith("auto") for label in labels)
        optimal = any(p.label in labels for p in best)
        colour = COLOURS["saved"] if optimal else COLOURS["parameters"]
        panel.plot(size / GIB, seconds, "D" if automatic else "o", color=colour, markersize=4.5, zorder=3)
    chosen = {"markersize": 10, "markerfacecolor": "none", "color": "black"}
    panel.plot(plan.peak_bytes / GIB, plan.seconds, "o", zorder=4, label="this plan", **chosen)
    left, right = min(p.bytes for p in points) / GIB, max(p.bytes for p in points) / GIB
    gpu = plan.settings.gpu_gib
    sizes = [size for size in _capacities(plan, right) if 0.85 * left <= size <= max(1.4 * right, right + 8)]
    right = max([right, *sizes])
    panel.set_xlim(left - 0.08 * (right - left), right + 0.08 * (right - left))
    panel.margins(y=0.14)
    # Where things lie, which the names of the lines need.
    drawn.draw_without_rendering()
    _capacity_lines(plan, panel, sizes, across=False)
    panel.grid(axis="y")
    shaded = "shaded: margins of the given card" if gpu in sizes else f"the {gpu:g} GiB that are given lie outside"
    panel.set_xlabel(f"peak of the iteration, GiB without margins; {shaded}")
    panel.set_ylabel("predicted seconds of an iteration")
    title(
        panel,
        subject(plan.settings),
        verdict(plan),
        f"policy {shortened(plan.policy)}",
        pad=23,
    )
    for shape, colour, name in (
        ("o", COLOURS["saved"], "a policy"),
        ("D", COLOURS["saved"], "auto, for so much memory"),
        ("o", COLOURS["parameters"], "beaten in memory and time"),
    ):
        if colour == COLOURS["saved"] or any(p not in best for p in points):
            panel.plot([], [], shape, color=colour, markersize=4.5, label=name)
    drawn.legend(loc="outside lower center", ncols=2, handlelength=1.2)
    drawn.draw_without_rendering()
    lines = [((size, low), (size, high)) for size in sizes for low, high in [panel.get_ylim()]]
    lines += [((a.bytes / GIB, a.seconds), (b.bytes / GIB, b.seconds)) for a, b in pairwise(best)]
    texts = together(panel, [((size / GIB, seconds), ", ".join(labels)) for (size, seconds), labels in merged.items()])
    if (plan.peak_bytes, plan.seconds) not in merged:
        texts.append(((plan.peak_bytes / GIB, plan.seconds), "this plan"))
    place(drawn, panel, texts, lines)
    return drawn


# What is kept.


def saved(plan: Plan) -> Any:
    """What the replay's forward keeps without checkpointing, by op group, with and without block ops."""
    mode = plan.settings.block_ops if plan.settings.block_ops != "off" else "lossless"
    rows: list[tuple[str, dict[str, int], str]] = []
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
        rows.append((label, found.saved_by_group, colour))
    groups = sorted(
        {name for _, sizes, _ in rows for name in sizes}, key=lambda name: -max(s.get(name, 0) for _, s, _ in rows)
    )
    groups = [name for name in groups if any(sizes.get(name, 0) >> 20 for _, sizes, _ in rows)]
    drawn, panel = bars(groups, rows, (GIB, "GiB"))
    title(panel, subject(with_policy(plan.settings, "none")), "without checkpointing")
    return drawn


# Sizes.


def sizes(plan: Plan) -> Any:
    """The cheapest policy that fits the given GPU, by frames (or micro-batch) and resolution."""
    return _draw_map(plan, *cells(plan))


def _draw_map(plan: Plan, columns: list[dict[str, int]], rows: list[dict[str, int]], cells: list[list[Cell]]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    shades = LinearSegmentedColormap.from_list("recomputation", SHADES)
    drawn, panel = figure(0.5 * len(rows) + 1.35)
    for y, line in enumerate(cells):
        for x, found in enumerate(line):
            fits = math.isfinite(found.level)
            look = {"facecolor": shades(found.level / 3)} if fits else {"facecolor": UNFIT, "hatch": "////"}
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, edgecolor="white", **look))
            colour = "white" if fits and found.level > 1.7 else "black"
            centred = {"ha": "center", "color": colour, "fontsize": 7}
            panel.text(x, y + 0.1, f"{found.bytes / GIB:.1f} GiB", va="bottom", fontweight="bold", **centred)
            panel.text(x, y + 0.04, found.label.replace(", ", ",\n") if fits else "does not fit", va="top", **centred)
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
    title(
        panel,
        subject(s, size=False),
        f"predicted peak, and what is recomputed ({', '.join(LADDER[:3])}) to fit the {given(s)}",
        "k/n: in k of n blocks (which count as equal), the rest one step cheaper",
        f"margins of {margins(plan):.1f} of {s.gpu_gib:.1f} GiB are left free; three sizes are planned, "
        "others interpolated",
        letters=88,
    )
    return drawn
