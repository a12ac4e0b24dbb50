"""Pictures of a plan: an iteration's timeline, policies compared, what is kept, and what fits at which size."""

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
from ..planning.settings import GIB, Settings
from ..planning.verdict import shortened
from .comparisons import LADDER, Cell, cells, compared, front, with_policy
from .labels import place
from .timeline import COLOURS, Strip, bars, legend, mark_peak, stacked

# Of `LADDER`.
SHADES = ("#fdf1e4", "#f5bd8a", "#d9642c", "#7a2e0e")
UNFIT = "#d5d9de"


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
    pictures = {"timeline": timeline, "policies": policies, "saved": saved, "sizes": sizes}
    return write(folder, {name: partial(picture, plan) for name, picture in pictures.items()})


def _subject(settings: Settings, *, size: bool = True) -> str:
    """The run in a line."""
    s = settings
    trained = f"LoRA {s.lora}" if s.lora else "full fine-tuning"
    parts = [
        Path(s.model).name,
        f"{s.frames} frames" if size and s.frames > 1 else "",
        f"{s.height} x {s.width}" if size else "",
        f"CFG {s.guidance_scale:g}" if s.guidance_scale != 1 else "",
        trained + (f" on an {s.quantization} base" if s.quantization != "none" else ""),
        s.dtypes,
        f"FSDP {s.strategy.replace('_', ' ')} over {s.fsdp} GPUs"
        if s.is_sharded
        else f"{s.fsdp} GPUs"
        if s.fsdp > 1
        else "",
        "rollout replica" if s.rollout_replica else "",
        f"block ops {s.block_ops}" if s.block_ops != "off" else "",
        "VAE in tiles" if s.vae_tiling == "on" else "",
        s.optimizer.replace("_", " ") if s.optimizer != "adamw" else "",
        "on the host: " + " + ".join(what.replace("_", " ").replace("vae", "VAE") for what in s.offload)
        if s.offload
        else "",
    ]
    return ", ".join(part for part in parts if part)


def _margins(plan: Plan) -> float:
    return sum(plan.margins.values()) / GIB


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
    _capacity_lines(plan, panel, sizes, across=True)
    title(
        panel,
        _subject(plan.settings),
        f"policy {shortened(plan.policy)}",
        ", ".join(filter(None, (f"peak {most:.1f} GiB", peak.name, peak.op, peak.module))),
        "widths: predicted seconds, short phases widened; shaded: margins",
    )
    mark_peak(drawn)
    legend(drawn)
    return drawn.figure


def _capacity_lines(plan: Plan, panel: Any, sizes: Sequence[float], *, across: bool) -> None:
    """Dashed, named beside the panel; the given one is heavier, with the margins shaded below it."""
    gpu = plan.settings.gpu_gib
    for size in sizes:
        mine = size == gpu
        look = {"color": "#222222" if mine else "#777777", "linewidth": 1.2 if mine else 0.8, "linestyle": (0, (4, 2))}
        if across:
            panel.axhline(size, **look)
            spot, offset, where = (1.0, size), (3, 0), {"ha": "left", "va": "center"}
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
    drawn, panel = figure(3.6)
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
    panel.grid(axis="y")
    given = "margins of the given GPU are shaded" if gpu in sizes else f"{gpu:g} GiB are given"
    panel.set_xlabel(f"peak of the iteration, GiB (exact; {given})")
    panel.set_ylabel("predicted seconds of an iteration")
    title(
        panel,
        _subject(plan.settings),
        "circled: this plan; line: none is better in both; auto n: for n GiB",
        pad=14,
    )
    drawn.draw_without_rendering()
    lines = [((size, low), (size, high)) for size in sizes for low, high in [panel.get_ylim()]]
    lines += [((a.bytes / GIB, a.seconds), (b.bytes / GIB, b.seconds)) for a, b in pairwise(best)]
    texts = [((size / GIB, seconds), ", ".join(labels)) for (size, seconds), labels in merged.items()]
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
    title(panel, _subject(with_policy(plan.settings, "none")), "without checkpointing")
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
        _subject(s, size=False),
        f"predicted peak, and what is recomputed ({', '.join(LADDER[:3])}) to fit {s.gpu_gib:g} GiB",
        "k/n: in k of n blocks (which count as equal), the rest one step cheaper",
        f"margins of {_margins(plan):.1f} GiB are left free; three sizes are planned, others interpolated",
        letters=88,
    )
    return drawn
