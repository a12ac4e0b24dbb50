"""Reward against iterations and against seconds, one row per recipe.

The samples of a prompt share their first noise, so that an iteration's mean moves by more than what is learned in it:
the line is the mean of the last `SMOOTH` of them.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

SMOOTH = 5


def smoothed(values: Sequence[float]) -> list[float]:
    """Of each value and those before it, `SMOOTH` at most."""
    parts = [values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the curves of every contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    figure, axes = plt.subplots(
        len(recipes), 2, figsize=(10, 3.4 * len(recipes)), constrained_layout=True, squeeze=False
    )
    styles = {"ours": ("C0", "-", 1.6), "batched": ("C2", "--", 1.6), "plain": ("C1", ":", 2.6)}
    for line, recipe in enumerate(recipes):
        for row in (row for row in rows if row["recipe"] == recipe):
            color, style, width = styles[row["contender"]]
            label = f"{row['contender']}, {row['seconds_median']:.2f} s an iteration"
            settings = {"color": color, "linestyle": style, "linewidth": width, "label": label}
            numbers = range(1, len(row["reward"]) + 1)
            reward = smoothed(row["reward"])
            axes[line][0].plot(numbers, row["reward"], ".", color=color, markersize=3, alpha=0.4)
            axes[line][0].plot(numbers, reward, **settings)
            axes[line][1].plot(list(accumulate(row["seconds"])), reward, **settings)
        axes[line][0].set(
            title=f"{recipe}: the same samples", xlabel="iteration", ylabel=f"reward of the rollout, mean of {SMOOTH}"
        )
        axes[line][1].set(title="and what they cost", xlabel="seconds of training on this CPU")
        axes[line][0].legend(frameon=False, fontsize=8)
        for axis in axes[line]:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
