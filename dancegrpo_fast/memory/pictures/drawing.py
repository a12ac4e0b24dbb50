"""What all pictures of memory share: colours, sizes, titles, bars and files."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
STYLE = {"font.size": 8.0, "svg.fonttype": "none", "svg.hashsalt": "plan", "hatch.linewidth": 0.5}
DPI = 200
WIDTH = 5.4
# Of a title's line.
LETTERS = 74
FIXED = "\N{NO-BREAK SPACE}"


def write(folder: str | Path, pictures: Mapping[str, Callable[[], Any]]) -> list[Path]:
    """Draws into a folder, which is made if it is not there; each as PNG and as SVG, the same bytes every time.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with matplotlib.rc_context(STYLE):
        for name, picture in pictures.items():
            drawn = picture()
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                found.append(folder / f"{name}.{kind}")
                drawn.savefig(found[-1], dpi=DPI, metadata=metadata)
    return found


def figure(height: float) -> tuple[Any, Any]:
    """A figure and its one panel; inches."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    panel = drawn.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    return drawn, panel


def broken(text: str, letters: int = LETTERS) -> list[str]:
    """Lines of at most so many letters, as few as can be and about as long as each other, broken after "," ";" "+"."""
    whole = re.sub(r"(?<![,;+]) ", FIXED, text)

    def at(width: int) -> list[str]:
        return textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)

    count = len(at(letters))
    width = next(width for width in range(1, letters + 1) if len(at(width)) <= count)
    return [line.replace(FIXED, " ") for line in at(width)]


def title(panel: Any, *lines: str, pad: float = 6.0, letters: int = LETTERS) -> None:
    """Over the panel."""
    text = "\n".join(part for line in lines for part in broken(line, letters))
    panel.set_title(text, loc="left", fontsize=8, pad=pad)


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
        total = f"{label}: {sum(sizes.values()) / size:.1f} {name}"
        panel.barh([y + shift for y in range(len(groups))], values, 0.9 * thick, color=colour, label=total)
        for y, value in enumerate(values):
            text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
            panel.annotate(text, (value, y + shift), (3, 0), textcoords="offset points", va="center", fontsize=7)
    panel.set_yticks(range(len(groups)), groups)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(groups) - 0.45, -0.55)
    panel.margins(x=0.1)
    panel.grid(axis="x", alpha=0.3)
    panel.set_xlabel(f"kept for the backward, {name}, by the group of the operators that made it")
    panel.legend(frameon=False, loc="lower right")
    return drawn, panel
