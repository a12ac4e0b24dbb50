"""The pictures at the end of a run: samples before and after, and curves."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..drawing import COLOURS, by_iteration, figure, write
from .sheets import PAUSE, QUANTIZED, SAMPLERS, Panel, Samples, numbers, read_samples, save_pages, sheet
from .words import read_rows, score_names

Rows: TypeAlias = Sequence[Mapping[str, Any]]

# Frames of a video that a still picture shows, at most.
FRAMES = 9
SAME = "samples at the same place share prompt and initial noise"
STYLES = {"ode": "-", "sde": ":"}


def draw(root: Path) -> tuple[list[Path], str | None]:
    """Draws `before_after.png` and `curves.png` of a run that evaluates, and `before_after.gif` of videos.

    Args:
        root: directory of the run.

    Returns:
        Where the pictures are, and why samples are not shown, where a file of them is missing, damaged or of an earlier
        version.

    Raises:
        ValueError: the run lacks its rows.
    """
    evaluations = read_rows(root / "evaluations.jsonl")
    curves = write(root, {"curves": partial(_curves, read_rows(root / "metrics.jsonl"), evaluations)}, ["png"])
    try:
        return [*_before_after(root, evaluations), *curves], None
    except ValueError as error:
        return curves, str(error)


def _by_sampler(evaluations: Rows) -> list[tuple[str, Rows]]:
    found = [(sampler, [row for row in evaluations if row["sampler"] == sampler]) for sampler in SAMPLERS]
    return [(sampler, rows) for sampler, rows in found if rows]


def _before_after(root: Path, evaluations: Rows) -> list[Path]:
    shown: list[tuple[str, Samples]] = []
    for sampler, rows in _by_sampler(evaluations):
        name = SAMPLERS[sampler]
        for when, row in (("before", rows[0]), ("after", rows[-1])):
            scores = [f"{score} {row[score]:.2f}" for score in score_names(row)]
            title = "\n".join([f"{when}, {name}", f"iteration {row['iteration']}", *scores])
            shown.append((title, read_samples(root / "samples" / f"{row['iteration']:06d}-{sampler}.png")))
    prompts, fps, (_, samples, frames) = shown[0][1].prompts, shown[0][1].fps, shown[0][1].cells.shape[:3]
    path = root / "before_after.png"
    if frames == 1:
        panels = [Panel(title, found.cells, numbers(samples)) for title, found in shown]
        return [save_pages(path, sheet(panels, prompts, note=SAME)[0], fps)]
    # Of videos one sampler's samples, the ODE's if there are any: in the still picture the first of every prompt.
    times = np.linspace(0, frames - 1, min(frames, FRAMES)).round().astype(int)
    strips = [
        Panel(title, found.cells[:, 0, times, None], [str(time + 1) for time in times]) for title, found in shown[:2]
    ]
    moving = [Panel(title, found.cells, numbers(samples)) for title, found in shown[:2]]
    # Without dithering: its dots would move too.
    pages = [page.quantize(QUANTIZED, dither=0) for page in sheet(moving, prompts, note=SAME)[0]]
    return [
        save_pages(path, sheet(strips, prompts, across="frame", note=SAME)[0], fps),
        save_pages(path.with_suffix(".gif"), pages, fps, last=PAUSE),
    ]


def _curves(metrics: Rows, evaluations: Rows) -> Any:
    drawn, ((rewards, scores), (diversity, ratio)) = figure(2.6, 2, 2)

    def plot(panel: Any, rows: Rows, values: Any, label: str | None, style: str = "-", **look: Any) -> Any:
        marker = "o" if len(rows) <= 30 else None
        [line] = panel.plot([row["iteration"] for row in rows], values, style, marker=marker, label=label, **look)
        return line

    # A run that was continued with other rewards has rows without some.
    names = dict.fromkeys(key for row in metrics for key in row if key.startswith("reward/"))
    for name in [key.removeprefix("reward/") for key in names]:
        scored = [row for row in metrics if f"reward/{name}" in row]
        mean, std = (np.array([row[f"{kind}/{name}"] for row in scored]) for kind in ("reward", "reward_std"))
        colour = plot(rewards, scored, mean, name).get_color()
        rewards.fill_between(
            [row["iteration"] for row in scored], mean - std, mean + std, alpha=0.15, color=colour, linewidth=0
        )
    by_iteration(rewards, "rewards of the rollouts (SDE): mean, and std of the samples shaded", "reward")

    for place, (sampler, rows) in enumerate(_by_sampler(evaluations)):
        style = STYLES[sampler]
        for i, name in enumerate(dict.fromkeys(name for row in rows for name in score_names(row))):
            # One legend for both samplers.
            label = None if place else name
            there = [row for row in rows if name in row]
            plot(scores, there, [row[name] for row in there], label, style, color=COLOURS[i % len(COLOURS)])
        plot(diversity, rows, [row["diversity"] for row in rows], SAMPLERS[sampler], style, color=COLOURS[0])
        if "diversity_accepted" in rows[0]:
            # None, where too few were accepted, leaves a gap.
            values = np.array([row["diversity_accepted"] for row in rows], dtype=float)
            plot(diversity, rows, values, f"{SAMPLERS[sampler]}, accepted samples", style, color=COLOURS[1])
    by_iteration(scores, "scores on fixed held-out noises: mean (ODE solid, SDE dotted)", "score")
    by_iteration(diversity, "diversity: std of a pixel within a prompt", "std of values in [0, 1]")
    diversity.set_ylim(bottom=0)

    labels = {
        "clip_fraction": "clipped fraction, all updates",
        "ratio_first_update_max_dev": "largest |ratio - 1|, first update",
    }
    for key, label in labels.items():
        rows = [row for row in metrics if key in row]
        plot(ratio, rows, [row[key] for row in rows], label)
    by_iteration(ratio, "policy ratio", "fraction, deviation")
    return drawn
