"""Pictures of a run whose samples are videos: strips of their frames, and the same moving, before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CELL = 48  # pixels of a frame in the GIF, at least
PAUSE = 600  # milliseconds on the last frame


def read_clips(path: Path, prompts: int, samples: int, frames: int) -> NDArray[np.uint8]:
    """Frames of a sample file, `[prompts, samples, frames, H, W, 3]`: one row per sample, one column per frame."""
    from PIL import Image

    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"))
    height, width = pixels.shape[0] // (prompts * samples), pixels.shape[1] // frames
    return pixels.reshape(prompts, samples, height, frames, width, 3).transpose(0, 1, 3, 2, 4, 5)


def short_names(prompts: Sequence[str]) -> list[str]:
    """Prompts without the words that all of them begin with."""
    words = [prompt.split() for prompt in prompts]
    shared = 0
    while len({tuple(row[: shared + 1]) for row in words}) == 1 and shared < len(words[0]) - 1:
        shared += 1
    return [" ".join(row[shared:]) for row in words]


def titles(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of both halves: when, which samples, and the scores of all evaluated samples."""
    return [
        f"{when} (iteration {row['iteration']}), ODE samples\n"
        + "\n".join(
            ", ".join(f"{name} {row[name]:.2f}" for name in names[start : start + 2])
            for start in range(0, len(names), 2)
        )
        for when, row in (("before", before), ("after", after))
    ]


def draw_strips(path: Path, clips: Sequence[NDArray[np.uint8]], prompts: Sequence[str], heads: Sequence[str]) -> Path:
    """Draws the first sample of every prompt: a row per prompt, a column per frame, before on the left.

    Args:
        path: of the PNG.
        clips: before and after, `[P, S, T, H, W, 3]`.
        prompts: P of them.
        heads: titles of the halves.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count, _, frames, height, width, _ = clips[0].shape
    panel = 6.0
    tall = panel * count * height / (frames * width)
    names = short_names(prompts)
    # text takes about a tenth of an inch a letter and a fifth a line
    size = 2 * panel + 0.3 + 0.09 * max(map(len, names)), tall + 0.8 + 0.2 * max(head.count("\n") + 1 for head in heads)
    figure, axes = plt.subplots(1, 2, figsize=size, constrained_layout=True, sharey=True)
    for axis, clip, head in zip(axes, clips, heads, strict=True):
        gap = max(1, width // 8)
        cells = np.pad(
            clip[:, 0].transpose(0, 2, 1, 3, 4), ((0, 0), (0, gap), (0, 0), (0, gap), (0, 0)), constant_values=255
        )
        axis.imshow(cells.reshape(count * (height + gap), frames * (width + gap), 3), interpolation="nearest")
        axis.set_title(head, fontsize=9)
        axis.set_xticks([(width + gap) * i + width / 2 - 0.5 for i in range(frames)], range(1, frames + 1), fontsize=8)
        axis.set_yticks([(height + gap) * i + height / 2 - 0.5 for i in range(count)], names, fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.supxlabel("frame; every row is one fixed initial noise, the same before and after", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_moving(
    path: Path, clips: Sequence[NDArray[np.uint8]], prompts: Sequence[str], heads: Sequence[str], fps: float | None
) -> Path:
    """Draws all samples as a GIF: a row per prompt, a column per sample, before on the left.

    Args:
        path: of the GIF.
        clips: before and after, `[P, S, T, H, W, 3]`.
        prompts: P of them.
        heads: titles of the halves.
        fps: None shows 8 frames a second.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, samples, frames, height, width, _ = clips[0].shape
    scale = max(1, -(-CELL // width))
    high, wide = height * scale, width * scale
    gap, font = max(4, wide // 12), ImageFont.load_default(size=13)
    labels = short_names(prompts)
    margin = int(max(font.getlength(label) for label in labels)) + 2 * gap
    lines = max(head.count("\n") + 1 for head in heads)
    half = max(samples * (wide + gap), *(int(font.getlength(line)) for head in heads for line in head.split("\n")))
    top, middle = 17 * lines + 2 * gap, 4 * gap
    page = Image.new("RGB", (margin + 2 * half + middle, top + count * (high + gap)), "white")
    pen = ImageDraw.Draw(page)
    for row, label in enumerate(labels):
        pen.text((gap, top + row * (high + gap) + high // 2), label, fill="black", font=font, anchor="lm")
    for side, head in enumerate(heads):
        pen.multiline_text((margin + side * (half + middle), gap), head, fill="black", font=font, spacing=4)
    pages = []
    for time in range(frames):
        shown = page.copy()
        for side, clip in enumerate(clips):
            for row in range(count):
                for column in range(samples):
                    frame = Image.fromarray(np.ascontiguousarray(clip[row, column, time]))
                    place = margin + side * (half + middle) + column * (wide + gap), top + row * (high + gap)
                    shown.paste(frame.resize((wide, high), Image.Resampling.NEAREST), place)
        # without dithering: its dots would move too
        pages.append(shown.quantize(24, dither=Image.Dither.NONE))
    step = round(1000 / (fps or 8))
    durations = [step] * (frames - 1) + [PAUSE]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=durations, loop=0, optimize=True)
    return path
