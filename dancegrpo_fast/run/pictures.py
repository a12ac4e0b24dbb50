"""What a person sees of a run: the progress line, sample files, and the pictures and the closing line at its end."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..files import writing
from .clips import draw_moving, draw_strips, read_clips, titles

SAMPLERS = {"ode": "ODE", "sde": "SDE"}


def progress_line(row: Mapping[str, Any], iterations: int, seconds_left: float) -> str:
    """One iteration in one line."""
    names = [key.removeprefix("reward/") for key in row if key.startswith("reward/")]
    seconds = row["seconds"]
    parts = [f"{row['iteration']:>{len(str(iterations))}}/{iterations}"]
    parts += [f"{name} {row[f'reward/{name}']:.3f} (std {row[f'reward_std/{name}']:.3f})" for name in names]
    if "ratio_first_update_max_dev" in row:
        parts.append(f"ratio dev {row['ratio_first_update_max_dev']:.1e}")
    if "clip_fraction" in row:
        parts.append(f"clipped {row['clip_fraction']:.0%}")
    parts += [
        f"equal groups {row['zero_std_groups']}",
        f"sample {seconds['sample']:.2f}s reward {seconds['reward']:.2f}s train {seconds['train']:.2f}s",
        f"left {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}",
    ]
    return "  ".join(parts)


def save_samples(folder: Path, iteration: int, sampler: str, grid: Tensor) -> Path:
    """Writes `<iteration>-<sampler>.png`.

    Images: one column per prompt, one row per sample. Videos: one column per frame, one row per sample; the samples of
    a prompt are neighbours.

    Args:
        folder: created where missing.
        iteration: the samples' model.
        sampler: "ode" or "sde".
        grid: `[prompts, samples, T, 3, H, W]` in [0, 1] on the 8-bit grid.
    """
    from PIL import Image

    table = grid.transpose(0, 1)[:, :, 0] if grid.shape[2] == 1 else grid.flatten(0, 1)
    pixels = (table * 255).round().byte().permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    path = folder / f"{iteration:06d}-{sampler}.png"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a `.jsonl` file of a run.

    Raises:
        ValueError: there is none.
    """
    if not path.is_file():
        raise ValueError(f"run: got {path.parent}, want the directory of a run ({path.name} is missing)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(root: Path, prompts: Sequence[str], samples: int, frames: int = 1, fps: float | None = None) -> list[Path]:
    """Draws `before_after.png` and `curves.png` of a run that evaluates, and `before_after.gif` of videos.

    Args:
        root: directory of the run.
        prompts: in the sample files.
        samples: of each prompt in the sample files.
        frames: of a sample.
        fps: of videos.

    Returns:
        Where the pictures are.
    """
    evaluations = read_rows(root / "evaluations.jsonl")
    if frames == 1:
        return [_draw_samples(root, evaluations, prompts, samples), _draw_curves(root, evaluations)]
    shown = [row for row in evaluations if row["sampler"] == "ode"]
    ends = shown[0], shown[-1]
    clips = [
        read_clips(root / "samples" / f"{row['iteration']:06d}-ode.png", len(prompts), samples, frames) for row in ends
    ]
    heads = titles(*ends, _score_names(shown[0]))
    return [
        draw_strips(root / "before_after.png", clips, prompts, heads),
        draw_moving(root / "before_after.gif", clips, prompts, heads, fps),
        _draw_curves(root, evaluations),
    ]


def _score_names(row: Mapping[str, Any]) -> list[str]:
    return [key for key in row if key not in ("iteration", "sampler", "diversity")]


def _draw_samples(root: Path, evaluations: Sequence[Mapping[str, Any]], prompts: Sequence[str], samples: int) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    columns = {"before": evaluations[0]["iteration"], "after": evaluations[-1]["iteration"]}
    images = {
        (sampler, when): _spaced(Image.open(root / "samples" / f"{iteration:06d}-{sampler}.png"), samples, len(prompts))
        for sampler in SAMPLERS
        for when, iteration in columns.items()
    }
    height, width, _ = next(iter(images.values())).shape
    panel = 6.0
    figure, axes = plt.subplots(
        2, 2, figsize=(2 * panel + 0.4, 2 * panel * height / width + 1.9), constrained_layout=True
    )
    for row, sampler in enumerate(SAMPLERS):
        for column, (when, iteration) in enumerate(columns.items()):
            axis = axes[row][column]
            axis.imshow(images[sampler, when], interpolation="nearest")
            shown = next(r for r in evaluations if r["sampler"] == sampler and r["iteration"] == iteration)
            scores = ", ".join(f"{name} {shown[name]:.2f}" for name in _score_names(shown))
            axis.set_title(f"{when} (iteration {iteration}), {SAMPLERS[sampler]} samples\n{scores}", fontsize=10)
            cell = width / len(prompts)
            axis.set_xticks([cell * (i + 0.5) - 0.5 for i in range(len(prompts))])
            axis.set_xticklabels([prompt.split()[-1].strip('"') for prompt in prompts], fontsize=8)
            axis.set_yticks([])
            axis.tick_params(length=0)
            for spine in axis.spines.values():
                spine.set_visible(False)
    figure.supxlabel("prompt (last word); the rows are fixed initial noises, the same before and after", fontsize=9)
    path = root / "before_after.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _spaced(image: Any, rows: int, columns: int) -> NDArray[np.uint8]:
    """The samples of a grid with white gaps between them."""
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    gap = max(1, width // 8)
    cells = pixels.reshape(rows, height, columns, width, 3)
    spaced = np.pad(cells, ((0, 0), (0, gap), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return spaced.reshape(rows * (height + gap), columns * (width + gap), 3)


def _draw_curves(root: Path, evaluations: Sequence[Mapping[str, Any]]) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = read_rows(root / "metrics.jsonl")
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 7), constrained_layout=True)
    iterations = [row["iteration"] for row in metrics]
    axis = axes[0][0]
    for name in [key.removeprefix("reward/") for key in metrics[0] if key.startswith("reward/")]:
        mean = [row[f"reward/{name}"] for row in metrics]
        std = [row[f"reward_std/{name}"] for row in metrics]
        (line,) = axis.plot(iterations, mean, label=name)
        low, high = [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)]
        axis.fill_between(iterations, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axis.set(title="reward of the rollouts (SDE), mean and std of the samples", xlabel="iteration")
    axis.legend(frameon=False)

    styles = {"ode": "-", "sde": ":"}
    axis = axes[0][1]
    for index, name in enumerate(_score_names(evaluations[0])):
        for sampler, style in styles.items():
            rows = [row for row in evaluations if row["sampler"] == sampler]
            axis.plot(
                [row["iteration"] for row in rows],
                [row[name] for row in rows],
                style,
                color=f"C{index}",
                marker="o",
                markersize=3,
                label=f"{name}, {SAMPLERS[sampler]}",
            )
    axis.set(title="scores on fixed held-out noises", xlabel="iteration")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    axis = axes[1][0]
    for index, (sampler, style) in enumerate(styles.items()):
        rows = [row for row in evaluations if row["sampler"] == sampler]
        base = rows[0]["diversity"]
        axis.plot(
            [row["iteration"] for row in rows],
            [100 * row["diversity"] / base for row in rows],
            style,
            color=f"C{index}",
            marker="o",
            markersize=3,
            label=f"{SAMPLERS[sampler]}, 100 % = {base:.3f}",
        )
    axis.set(title="diversity left: pixel std within a prompt, % of the base", xlabel="iteration", ylim=(0, None))
    axis.legend(frameon=False)

    axis = axes[1][1]
    labels = {
        "clip_fraction": "clipped fraction, all updates",
        "ratio_first_update_max_dev": "largest |ratio - 1|, first update",
    }
    for key, label in labels.items():
        rows = [row for row in metrics if key in row]
        axis.plot([row["iteration"] for row in rows], [row[key] for row in rows], label=label)
    axis.set(title="policy ratio", xlabel="iteration", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    path = root / "curves.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def closing_line(root: Path, name: str) -> str:
    """What the run achieved, in one line."""
    metrics = read_rows(root / "metrics.jsonl")
    seconds = sum(sum(row["seconds"].values()) for row in metrics)
    measured = [row["ratio_first_update_max_dev"] for row in metrics if "ratio_first_update_max_dev" in row]
    deviation = f"{max(measured):g}" if measured else "not measured"
    parts = []
    if (root / "evaluations.jsonl").is_file():
        rows = [row for row in read_rows(root / "evaluations.jsonl") if row["sampler"] == "ode"]
        parts += [f"{score} {rows[0][score]:.3f} -> {rows[-1][score]:.3f}" for score in _score_names(rows[0])]
        left = rows[-1]["diversity"] / rows[0]["diversity"]
        parts.append(f"diversity {rows[0]['diversity']:.3f} -> {rows[-1]['diversity']:.3f} ({left:.0%} left)")
    parts.append(f"ratio_first_update_max_dev {deviation}")
    parts.append(f"{len(metrics)} iterations in {seconds:.0f} s")
    return f"{name}: {', '.join(parts)}; everything is in {root}"
