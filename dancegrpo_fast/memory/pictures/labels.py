"""Places labels of points so that they can be read."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, TypeAlias

Spot: TypeAlias = tuple[float, float]
# How often an axis may grow by 6 % for a label, and how many places are tried along it.
GROWTHS, STEPS = 40, 60


def place(figure: Any, panel: Any, texts: Sequence[tuple[Spot, str]], lines: Sequence[tuple[Spot, Spot]]) -> None:
    """Labels beside their points, each where it lies on no label, point, line or edge; else the least bad place."""
    from matplotlib.transforms import Bbox

    unit = figure.dpi / 72

    def around(x: float, y: float, reach: float) -> Any:
        return Bbox.from_bounds(x - reach * unit, y - reach * unit, 2 * reach * unit, 2 * reach * unit)

    taken = [around(x, y, 4) for x, y in panel.transData.transform([spot for spot, _ in texts])]
    for ends in lines:
        (x0, y0), (x1, y1) = panel.transData.transform(ends)
        steps = math.ceil(math.hypot(x1 - x0, y1 - y0) / (2 * unit)) or 1
        taken += [around(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps, 1) for i in range(steps + 1)]
    for spot, text in sorted(texts):
        note = panel.annotate(text, spot, (0, 0), textcoords="offset points", fontsize=7, zorder=5)
        best: tuple[float, dict[str, Any], Any] | None = None
        for reach in (8, 14, 22, 32):
            for turn in range(16):
                dx, dy = reach * math.cos(math.tau * turn / 16), reach * math.sin(math.tau * turn / 16)
                look = {
                    "position": (dx, dy),
                    "ha": "left" if dx > 1 else "right" if dx < -1 else "center",
                    "va": "center" if abs(dy) < 4 else "bottom" if dy > 0 else "top",
                }
                note.set(**look)
                box = note.get_window_extent()
                bad = sum(_overlap(box, other) for other in taken)
                bad += box.width * box.height - _overlap(box, panel.bbox) + reach * unit
                if best is None or bad < best[0]:
                    best = bad, look, box
        assert best is not None
        note.set(**best[1])
        taken.append(best[2])
        if math.hypot(*best[1]["position"]) > 9:
            leader = {"arrowstyle": "-", "linewidth": 0.5, "color": "#555555", "shrinkA": 0, "shrinkB": 3}
            panel.annotate("", spot, best[1]["position"], textcoords="offset points", arrowprops=leader, zorder=2)


def above(
    figure: Any, panel: Any, text: str, spot: Spot, skyline: Sequence[Spot], bands: Sequence[tuple[float, float]]
) -> None:
    """A label as near its point as can be, over a skyline and across no band; the y axis grows until there is room.

    Args:
        figure: laid out but for this label.
        panel: of it.
        text: of the label.
        spot: its point, in data's coordinates, on the skyline.
        skyline: (x, y) of steps that change midway, by rising x.
        bands: (from, to) in y.
    """
    unit = figure.dpi / 72
    note = panel.annotate(text, spot, spot, va="bottom", ha="left", fontsize=7, zorder=6)
    figure.draw_without_rendering()
    box, gap = note.get_window_extent(), 4 * unit
    width, height = box.width + gap, box.height + gap
    xs = [x for x, _ in skyline]
    for _ in range(GROWTHS):
        inside, best = panel.get_window_extent(), None
        x0, x1 = inside.x0 + gap, max(inside.x1 - width, inside.x0 + gap)
        dot = panel.transData.transform(spot)
        to_data = panel.transData.inverted().transform
        for i in range(STEPS + 1):
            x = x0 + (x1 - x0) * i / STEPS
            first, last = (to_data((edge, 0))[0] for edge in (x - gap, x + width))
            below = skyline[max(bisect_left(xs, first) - 1, 0) : bisect_right(xs, last) + 1]
            y = panel.transData.transform((0, max(top for _, top in below)))[1] + 1.5 * gap
            for band in sorted(bands):
                low, high = (panel.transData.transform((0, edge))[1] for edge in band)
                if y < high + gap and y + height > low - gap:
                    y = high + gap
            away = math.hypot(max(x - dot[0], 0, dot[0] - x - width), y - dot[1])
            if y + height <= inside.y1 and (best is None or away < best[0]):
                best = away, x, y
        if best is not None:
            break
        low, high = panel.get_ylim()
        panel.set_ylim(low, low + (high - low) * 1.06)
    else:
        best = 0.0, x0, inside.y1 - height
    _, x, y = best
    note.set_position(to_data((x, y)))
    note.set_multialignment("right" if dot[0] > x + width / 2 else "left")
    end = to_data((min(max(dot[0], x), x + box.width), min(max(dot[1], y), y + box.height)))
    leader = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2}
    panel.annotate("", spot, end, arrowprops=leader, zorder=5)


def _overlap(a: Any, b: Any) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0) * max(height, 0))
