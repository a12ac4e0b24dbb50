"""The table of compiled recipes, and one process of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.compiling import measure, table

from ..train import tiny


def test_rows_make_the_table() -> None:
    def row(setting: str, seconds: list[float], compiled: float | None, ratio: float = 0.0) -> dict[str, Any]:
        found = {"recipe": "digits", "setting": setting, "seconds": seconds, "compile_seconds": compiled}
        return found | {"with_gradients": compiled and setting == "whole", "ratio_deviation": ratio}

    rows = [
        row("null", [2.0, 2.0], None),
        row("blocks", [1.0, 1.0], 30.0),
        row("whole", [0.5, 0.5], 40.0),
        row("null", [2.0, 4.0], None),
        row("blocks", [1.0, 1.0], 10.0),
        row("whole", [0.5, 0.5], 12.0, 1e-5),
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(rows)[2:]]
    assert cells == [
        ["digits", "null", "2.000", "1.00x", "-", "-", "-", "0"],
        ["digits", "blocks", "1.000", "2.00x", "30", "10", "without gradients", "0"],
        ["digits", "whole", "0.500", "4.00x", "40", "12", "the replay's", "1e-05"],
    ]


def test_a_process_measures_its_iterations(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.make_recipe(flux, tmp_path / "run")
    (tmp_path / "recipes").mkdir()
    tiny.write_recipe(recipe, tmp_path / "recipes" / "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    row = measure("tiny", "null", 2, 1)
    assert len(row["seconds"]) == 2 and row["compile_seconds"] is None and row["ratio_deviation"] == 0.0
    assert json.loads(json.dumps(row)) == row
