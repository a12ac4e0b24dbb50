"""What a run says in a line: of an iteration, and at its end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..recipe.evaluation import FIELDS


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


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
        f"equal groups {row['zero_std_groups']}" + (f"  dropped {row['dropped']}" if row.get("dropped") else ""),
        f"sample {seconds['sample']:.2f}s reward {seconds['reward']:.2f}s train {seconds['train']:.2f}s",
        f"left {duration(seconds_left)}",
    ]
    return "  ".join(parts)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a `.jsonl` file of a run.

    Raises:
        ValueError: there is none.
    """
    if not path.is_file():
        raise ValueError(f"run: got {path.parent}, want the directory of a run ({path.name} is missing)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread_text(row: Mapping[str, Any]) -> str:
    """The diversities of an evaluation, in a line."""
    if row.get("diversity_accepted") is None:
        return f"diversity {row['diversity']:.3f}"
    return f"diversity {row['diversity']:.3f}, of accepted samples {row['diversity_accepted']:.3f}"


def score_names(row: Mapping[str, Any]) -> list[str]:
    """Of a row of `evaluations.jsonl`."""
    return [key for key in row if key not in FIELDS]


def closing_line(root: Path, name: str) -> str:
    """What the run achieved, in one line."""
    metrics = read_rows(root / "metrics.jsonl")
    seconds = sum(sum(row["seconds"].values()) for row in metrics)
    measured = [row["ratio_first_update_max_dev"] for row in metrics if "ratio_first_update_max_dev" in row]
    deviation = f"{max(measured):g}" if measured else "not measured"
    parts = []
    if (root / "evaluations.jsonl").is_file():
        rows = read_rows(root / "evaluations.jsonl")
        # The ODE's, if the newest evaluation has it.
        newest = [row["sampler"] for row in rows if row["iteration"] == rows[-1]["iteration"]]
        rows = [row for row in rows if row["sampler"] == newest[0]]
        # An evaluation that was changed on the way has other scores.
        for score in score_names(rows[-1]) if rows else ():
            first = next(row[score] for row in rows if score in row)
            parts.append(f"{score} {first:.3f} -> {rows[-1][score]:.3f}")
        for key, label in (("diversity", "diversity"), ("diversity_accepted", "of accepted samples")):
            first, last = (row.get(key) for row in (rows[0], rows[-1])) if rows else (None, None)
            if first is not None and last is not None:
                # A single sample of a prompt has none.
                left = f" ({last / first:.0%} left)" if first else ""
                parts.append(f"{label} {first:.3f} -> {last:.3f}{left}")
    parts.append(f"ratio_first_update_max_dev {deviation}")
    parts.append(f"{len(metrics)} iterations in {duration(seconds)}")
    return f"{name}: {', '.join(parts)}; everything is in {root}"
