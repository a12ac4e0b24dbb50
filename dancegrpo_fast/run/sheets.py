"""Sheets of samples: a row per prompt, a column per sample or frame, large enough to be seen."""

import json
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..files import writing

Cells: TypeAlias = NDArray[np.uint8]

SAMPLERS = {"ode": "ODE", "sde": "SDE"}
# Pixels of a cell's longer side: smaller ones are enlarged; larger ones are reduced where a picture compares.
LEAST, MOST = 64, 256
# Letters of a label's line.
LETTERS = 24
# Colours of a GIF.
QUANTIZED = 128
# Of a moving picture: milliseconds on its last frame.
PAUSE = 600
KEY = "samples"


class Panel(NamedTuple):
    """Samples beside others.

    Attributes:
        title: its first line is bold.
        cells: `[P, columns, T, H, W, 3]`.
        columns: their headings.
    """

    title: str
    cells: Cells
    columns: Sequence[str]


class Samples(NamedTuple):
    """What a sample file holds: `[P, S, T, H, W, 3]`, P prompts, and frames a second of videos."""

    cells: Cells
    prompts: list[str]
    fps: float | None


def numbers(count: int) -> list[str]:
    """Headings of so many columns."""
    return [str(i + 1) for i in range(count)]


def short_names(prompts: Sequence[str]) -> tuple[str, list[str]]:
    """The words that all of several prompts begin with, and what each says after them."""
    words = [prompt.split() for prompt in prompts]
    most = min(map(len, words)) - 1 if len(words) > 1 else 0
    shared = next((i for i in range(most) if len({row[i] for row in words}) > 1), max(most, 0))
    return " ".join(words[0][:shared]), [" ".join(row[shared:]) for row in words]


def sheet(
    panels: Sequence[Panel], prompts: Sequence[str], *, across: str = "sample", note: str = "", most: int | None = MOST
) -> tuple[list[Any], dict[str, int]]:
    """Draws panels side by side: a picture for each frame, and where the cells of the first panel lie.

    Args:
        panels: of the same prompts, sizes and frames.
        prompts: P of them; long ones are wrapped, and cut with an ellipsis where the cell's height ends.
        across: what a column is.
        note: below the cells.
        most: pixels of a cell's longer side; None leaves large cells as they are.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    frames, height, width = panels[0].cells.shape[2:5]
    longer = max(height, width)
    scale, part = -(-LEAST // longer), -(-longer // most) if most else 1
    high, wide = -(-height * scale // part), -(-width * scale // part)
    em = max(13, max(high, wide) // 16)
    plain, bold = (
        ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{kind}.ttf"), em)
        for kind in ("", "-Bold")
    )
    gap, row = em // 3, 5 * em // 4
    shared, names = short_names(prompts)
    head = textwrap.wrap(f"{shared} …", LETTERS, max_lines=3, placeholder=" …") if shared else []
    labels = [textwrap.wrap(n, LETTERS, max_lines=max(1, high // row), placeholder=" …") for n in names]
    margin = round(max(plain.getlength(line) for lines in (head, *labels, [across]) for line in lines)) + 3 * gap
    titles = [panel.title.split("\n") for panel in panels]
    lefts = [margin]
    for panel, lines in zip(panels, titles, strict=True):
        text = max(bold.getlength(line) for line in lines)
        lefts.append(lefts[-1] + max(panel.cells.shape[1] * (wide + gap), round(text)) + 3 * gap)
    notes = [", ".join(filter(None, (f"frame {i + 1} of {frames}" if frames > 1 else "", note))) for i in range(frames)]
    top = gap + row * (max(map(len, (head, *titles))) + 1) + gap
    bottom = top + len(names) * (high + gap)
    right = max(lefts[-1] - 2 * gap, *(margin + round(plain.getlength(line)) + gap for line in notes))
    page = Image.new("RGB", (right, bottom + (row + gap if any(notes) else 0)), "white")
    pen = ImageDraw.Draw(page)
    for i, line in enumerate(head):
        pen.text((margin - 2 * gap, top - row * (len(head) + 1 - i)), line, "dimgray", plain, anchor="ra")
    pen.text((margin - 2 * gap, top - row), across, "dimgray", plain, anchor="ra")
    for place, lines in enumerate(labels):
        middle = top + place * (high + gap) + high / 2 - row * (len(lines) - 1) / 2
        for i, line in enumerate(lines):
            pen.text((margin - 2 * gap, middle + i * row), line, "black", plain, anchor="rm")
    for left, panel, lines in zip(lefts, panels, titles, strict=False):
        for i, line in enumerate(lines):
            pen.text((left, gap + i * row), line, "black", plain if i else bold)
        for i, name in enumerate(panel.columns):
            pen.text((left + i * (wide + gap) + wide / 2, top - row), name, "dimgray", plain, anchor="ma")
    pages = []
    for time, line in enumerate(notes):
        shown = page.copy()
        ImageDraw.Draw(shown).text((margin, bottom + gap // 2), line, "dimgray", plain)
        for left, panel in zip(lefts, panels, strict=False):
            for place, column in np.ndindex(panel.cells.shape[:2]):
                cell = Image.fromarray(panel.cells[place, column, time])
                cell = cell.reduce(part) if part > 1 else cell.resize((wide, high), Image.Resampling.NEAREST)
                shown.paste(cell, (left + column * (wide + gap), top + place * (high + gap)))
        pages.append(shown)
    return pages, {"left": margin, "top": top, "gap": gap, "scale": scale, "height": height, "width": width}


def save_samples(
    folder: Path, iteration: int, sampler: str, grid: Tensor, prompts: Sequence[str], fps: float | None
) -> Path:
    """Writes `<iteration>-<sampler>.png`: a row per prompt, a column per sample; videos as animated PNG.

    Args:
        folder: created where missing.
        iteration: the samples' model.
        sampler: "ode" or "sde".
        grid: `[P, S, T, 3, H, W]` in [0, 1] on the 8-bit grid.
        prompts: P of them.
        fps: of videos; None shows 8 frames a second.
    """
    from PIL.PngImagePlugin import PngInfo

    cells = (grid * 255).round().byte().permute(0, 1, 2, 4, 5, 3).contiguous().numpy()
    title = f"iteration {iteration}, {SAMPLERS[sampler]}"
    pages, place = sheet([Panel(title, cells, numbers(cells.shape[1]))], prompts, most=None)
    info = PngInfo()
    info.add_text(KEY, json.dumps({**place, "prompts": list(prompts), "samples": cells.shape[1], "fps": fps}))
    path = folder / f"{iteration:06d}-{sampler}.png"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        save_pages(path, pages, fps, last=PAUSE, pnginfo=info)
    return path


def save_pages(
    path: Path, pages: Sequence[Any], fps: float | None, *, last: float | None = None, **options: Any
) -> Path:
    """Writes a picture, or a moving one, which as PNG has every page, equal neighbours too.

    Args:
        path: `.png` or `.gif`.
        pages: opaque pictures of PIL.
        fps: pages a second; None: 8.
        last: milliseconds that the last page stays; None: as the others.
        options: of Pillow's writer.
    """
    if len(pages) > 1:
        each = 1000 / (fps or 8)
        durations = [each] * (len(pages) - 1) + [last or each]
        options |= {"save_all": True, "append_images": pages[1:], "duration": durations, "loop": 0}
        if path.suffix == ".png":
            # Pillow joins equal neighbours that are blended alike; opaque pages look the same either way.
            options["blend"] = blend = [0]
            for before, page in pairwise(pages):
                blend.append(int(page == before and not blend[-1]))
    pages[0].save(path, optimize=path.suffix == ".gif", **options)
    return path


def read_samples(path: Path) -> Samples:
    """What `save_samples` wrote.

    Raises:
        ValueError: no such file, or a damaged one, or one of an earlier version.
    """
    from PIL import ImageSequence
    from PIL.PngImagePlugin import PngImageFile

    try:
        # `Image.open` refuses pictures as large as a sheet of large samples may be.
        with PngImageFile(path) as file:
            if KEY not in file.info:
                raise ValueError(f"run: got {path} without a layout in it, want a sample file of this version")
            known = json.loads(file.info[KEY])
            pages = np.stack([np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(file)])
    except (SyntaxError, OSError) as error:
        raise ValueError(f"run: got {path}, want a whole sample file: {error}") from error
    gap, scale, rows, columns = known["gap"], known["scale"], len(known["prompts"]), known["samples"]
    high, wide = known["height"] * scale, known["width"] * scale
    bottom, right = known["top"] + rows * (high + gap), known["left"] + columns * (wide + gap)
    cells = pages[:, known["top"] : bottom, known["left"] : right]
    cells = cells.reshape(len(pages), rows, high + gap, columns, wide + gap, 3)[:, :, :high:scale, :, :wide:scale]
    return Samples(np.ascontiguousarray(cells.transpose(1, 3, 0, 2, 4, 5)), known["prompts"], known["fps"])
