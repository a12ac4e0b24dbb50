"""Places labels of points so that they can be read."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

Spot: TypeAlias = tuple[float, float]


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


def together(panel: Any, texts: Sequence[tuple[Spot, str]], reach: float = 5.0) -> list[tuple[Spot, str]]:
    """Labels of points that lie within so many points (1/72 inch) of each other as one, at the first."""
    found: list[tuple[Spot, str]] = []
    for spot, text in sorted(texts):
        x, y = panel.transData.transform(spot)
        for i, (other, before) in enumerate(found):
            there = panel.transData.transform(other)
            if math.hypot(x - there[0], y - there[1]) < reach * panel.figure.dpi / 72:
                found[i] = other, f"{before}; {text}"
                break
        else:
            found.append((spot, text))
    return found


def _overlap(a: Any, b: Any) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0) * max(height, 0))
