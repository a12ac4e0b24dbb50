"""docs/metrics.md has every field that a run writes, and no other."""

import json
import re
from pathlib import Path
from typing import Any

from dancegrpo_fast.train.loop import Trainer

from .tiny import EvaluationSettings, LoraSettings, make_recipe, reward

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def fields(row: dict[str, Any]) -> set[str]:
    """Names of a row, those within it too, with NAME for a reward's."""
    inner = [name for value in row.values() if isinstance(value, dict) for name in value]
    outer = [name for name, value in row.items() if not isinstance(value, dict)]
    return {re.sub("(reward|reward_std|reward_group_std)/.*", r"\1/NAME", name) for name in (*inner, *outer)}


def documented(start: str, end: str) -> set[str]:
    """First cells of the tables between two headings."""
    text = PAGE.read_text(encoding="utf-8")
    part = text[text.index(start) : text.index(end)]
    return set(re.findall(r"^\| `([\w/]+)` \|", part, flags=re.MULTILINE))


def test_every_field_is_documented_and_no_other(diffusion: Path, tmp_path: Path) -> None:
    evaluation = EvaluationSettings(
        every=1, samples_per_prompt=2, accepted_by="Brightness", grid_samples=2, rewards=[reward("Brightness")]
    )
    options: dict[str, Any] = {"dtype": "float16", "lora": LoraSettings(rank=2), "kl_weight": 0.1}
    Trainer(make_recipe(diffusion, tmp_path / "run", iterations=1, evaluation=evaluation, **options)).run()
    row, evaluated = (
        json.loads((tmp_path / "run" / name).read_text().splitlines()[0])
        for name in ("metrics.jsonl", "evaluations.jsonl")
    )
    assert fields(row) == documented("## Every field", "## `evaluations.jsonl`")
    assert fields(evaluated) - {"Brightness", "iteration"} == documented("## `evaluations.jsonl`", "## What a symptom")
