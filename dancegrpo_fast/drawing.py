"""The look that all pictures share: sizes, titles, axes and files."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Can be told apart by the colour-blind.
COLOURS = ("#4f6d8f", "#d9642c", "#2b8a7e", "#8a7a3c", "#5d3a6e", "#7fc8b0", "#f2b48a", "#a9c3dd")
STYLE = {
    "axes.prop_cycle": f"cycler('color', {COLOURS})",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.0,
    "figure.constrained_layout.use": True,
    "font.size": 8.0,
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.0,
    "savefig.dpi": 200.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "plan",
}
# Inches of a panel, and letters of its title's line.
WIDTH, LETTERS = 5.4, 74
FIXED = "\N{NO-BREAK SPACE}"


def write(
    folder: str | Path, pictures: Mapping[str, Callable[[], Any]], kinds: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Draws into a folder, which is made if it is not there; the same bytes every time.

    Args:
        folder: of the files.
        pictures: what draws, by the files' stems.
        kinds: of each picture.

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
            for kind in kinds:
                found.append(folder / f"{name}.{kind}")
                drawn.savefig(found[-1], metadata={"Date": None} if kind == "svg" else None)
    return found


def figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its panel, or an array of them.

    Args:
        height: of a row, inches.
        rows: of panels.
        columns: of panels.
    """
    from matplotlib.figure import Figure

    width = WIDTH if columns == 1 else 0.85 * WIDTH * columns
    drawn = Figure(figsize=(width, height * rows))
    return drawn, drawn.subplots(rows, columns)


def by_iteration(panel: Any, title: str, unit: str) -> None:
    """Names a panel of curves over iterations, with ticks at whole ones, and its lines below it."""
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import offset_copy

    panel.set(title=title, xlabel="iteration", ylabel=unit)
    panel.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    panel.margins(y=0.1)
    panel.grid(axis="y")
    if panel.lines:
        below = offset_copy(panel.transAxes, panel.figure, y=-28, units="points")
        panel.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0, ncols=2)


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
    panel.set_title("\n".join(part for line in lines for part in broken(line, letters)), pad=pad)
