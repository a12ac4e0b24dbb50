"""Reward against iterations and against seconds, one row per recipe.

The samples of a prompt share their first noise, so that an iteration's mean moves by more than what is learned in it:
the line is the mean of the last `SMOOTH` of them.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from dancegrpo_fast.drawing import COLOURS, by_iteration, figure, write

SMOOTH = 5


def smoothed(values: Sequence[float]) -> list[float]:
    """Of each value and those before it, `SMOOTH` at most."""
    parts = [values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the curves of the main contenders."""
    write(path.parent, {path.stem: partial(_curves, rows)}, [path.suffix[1:]])


def _curves(rows: Sequence[dict[str, Any]]) -> Any:
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    drawn, panels = figure(3.0, len(recipes), 2)
    styles = {"ours": (COLOURS[0], "-"), "retain": (COLOURS[4], "-"), "batched": (COLOURS[2], "--")}
    styles["plain"] = (COLOURS[1], ":")
    for recipe, (samples, cost) in zip(recipes, panels.reshape(-1, 2), strict=True):
        for row in (row for row in rows if row["recipe"] == recipe and row["contender"] in styles):
            colour, style = styles[row["contender"]]
            label = f"{row['contender']}, {row['seconds_median']:.2f} s an iteration"
            reward = smoothed(row["reward"])
            numbers = range(1, len(reward) + 1)
            samples.plot(numbers, row["reward"], ".", color=colour, alpha=0.4)
            samples.plot(numbers, reward, style, color=colour, label=label)
            cost.plot(list(accumulate(row["seconds"])), reward, style, color=colour, label=label)
        by_iteration(samples, f"{recipe}: the same samples", f"reward of the rollout, mean of {SMOOTH}")
        cost.set(title="and what they cost", xlabel="seconds of training on this CPU")
        cost.grid(axis="y")
    return drawn
