"""`dancegrpo-fast evaluate`: every sample scored once, by the weights that were asked for."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from PIL import Image

from dancegrpo_fast.cli import main
from dancegrpo_fast.evaluate.scores import Scores, evaluate, summary, table_text
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.recipe import EvaluationSettings, Recipe
from dancegrpo_fast.train.held_out import Evaluator, accepted_diversity, diversity
from dancegrpo_fast.train.loop import Trainer

from ..processes import together
from ..train import tiny


def recipe_for(flux: Path, output: Path, **changes: Any) -> Recipe:
    # About half of the samples are bright.
    scores = [tiny.reward("Brightness"), tiny.reward("Brightness", threshold=0.465, label="bright")]
    settings = EvaluationSettings(every=1, samples_per_prompt=3, accepted_by="bright", rewards=scores)
    return tiny.make_recipe(flux, output, iterations=1, evaluation=settings, **changes)


@pytest.fixture(scope="module")
def trained(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    Trainer(recipe_for(flux, output)).run()
    return output


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def mean_brightness(rows: list[dict[str, Any]]) -> float:
    """A mean over the means of prompts, each of three samples."""
    scores = torch.tensor([row["scores"]["Brightness"] for row in rows], dtype=torch.float64)
    return scores.view(-1, 3).mean(dim=1).mean().item()


def test_scores_are_those_of_the_run(flux: Path, trained: Path, tmp_path: Path) -> None:
    recipe = recipe_for(flux, tmp_path / "unused")
    evaluate(recipe, None, tmp_path / "before")
    evaluate(recipe, str(trained), tmp_path / "after")
    measured = {
        (row["iteration"], row["sampler"]): row
        for row in map(json.loads, (trained / "evaluations.jsonl").read_text().splitlines())
    }
    for iteration, folder in enumerate(("before", "after")):
        rows = rows_of(tmp_path / folder)
        assert len(rows) == 2 * 3 * 3
        for sampler in ("ode", "sde"):
            ours = [row for row in rows if row["sampler"] == sampler]
            wanted = measured[iteration, sampler]
            assert mean_brightness(ours) == wanted["Brightness"]
            assert fmean(row["diversity"] for row in ours) == pytest.approx(wanted["diversity"])
            accepted = {row["prompt_index"]: row["diversity_accepted"] for row in ours}
            kept = [spread for spread in accepted.values() if spread is not None]
            assert 0 < len(kept) == wanted["accepted_prompts"]
            assert fmean(kept) == pytest.approx(wanted["diversity_accepted"]) != wanted["diversity"]


def test_samples_are_what_was_scored(flux: Path, tmp_path: Path) -> None:
    evaluate(recipe_for(flux, tmp_path / "unused"), None, tmp_path / "out", samplers=["ode"], by="colour")
    for row in rows_of(tmp_path / "out"):
        pixels = torch.from_numpy(np.array(Image.open(tmp_path / "out" / row["file"]))).float() / 255
        torch.testing.assert_close(pixels[..., 0].mean(), torch.tensor(row["scores"]["Brightness"]))
        folder = (tmp_path / "out" / row["file"]).parents[1]
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        assert metadata == {"prompt": row["prompt"], "colour": row["prompt"]}
    table = json.loads((tmp_path / "out" / "summary.json").read_text())["table"]
    groups = [row["group"] for row in table if row["score"] == "bright"]
    assert groups == ["all", "red", "green", "blue", "mean over colour"]
    assert "| ODE | red | Brightness |" in (tmp_path / "out" / "table.md").read_text()


def test_continues_where_it_ended(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(flux, tmp_path / "unused", micro_batch=3)
    evaluate(recipe, None, tmp_path / "whole")
    score, calls = Evaluator.score, []

    def broken(self: Evaluator, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *arguments)

    monkeypatch.setattr(Evaluator, "score", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, None, tmp_path / "parts")
    assert len(rows_of(tmp_path / "parts")) == 2 * 3
    with (tmp_path / "parts" / "scores.jsonl").open("a") as file:
        file.write('{"half')
    evaluate(recipe, None, tmp_path / "parts")
    assert len(calls) == 3 + 4
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"output: .* other settings, want another folder; seed: got 1, want 0$"):
        evaluate(replace(recipe, seed=1), None, tmp_path / "parts")


@pytest.mark.release
def test_processes_share_out_the_prompts_or_the_tokens(tmp_path: Path) -> None:
    base = tiny.make_flux(tmp_path / "base", text_tokens=4)
    recipe = recipe_for(base, tmp_path / "run", micro_batch=3)
    tiny.write_recipe(recipe, tmp_path / "recipe.json")
    worker = Path(__file__).parent / "evaluate_worker.py"
    together([[str(worker), str(rank), str(tmp_path)] for rank in range(2)], tmp_path, scripts=True)
    evaluate(recipe, None, tmp_path / "alone", samplers=["ode"])
    assert rows_of(tmp_path / "scores") == rows_of(tmp_path / "alone")
    for row in rows_of(tmp_path / "alone"):
        ours, theirs = (Image.open(tmp_path / name / row["file"]) for name in ("scores", "alone"))
        assert ours.tobytes() == theirs.tobytes()
    split, whole = rows_of(tmp_path / "split"), rows_of(tmp_path / "alone")
    assert [row["file"] for row in split] == [row["file"] for row in whole]
    for ours, theirs in zip(split, whole, strict=True):
        # Sums in another order may round a pixel to the next of 255 levels.
        assert ours["scores"]["Brightness"] == pytest.approx(theirs["scores"]["Brightness"], abs=1 / 255)
    tables = {(tmp_path / name).read_text() for name in ("scores/table.md", "alone/table.md")}
    assert len(tables) == 1
    assert all("got FSDP2" in (tmp_path / f"error.{rank}").read_text() for rank in range(2))


def test_columns_of_the_prompts_are_settings(flux: Path, tmp_path: Path) -> None:
    """Rewards read them: scores of other columns must not be continued."""
    recipe = recipe_for(flux, tmp_path / "unused")
    evaluate(recipe, None, tmp_path / "out", samplers=["ode"])
    prompts = Path(recipe.prompts)
    prompts.write_text(prompts.read_text().replace('"colour": "red"', '"colour": "rot"'))
    with pytest.raises(ValueError, match=r"output: .* other settings"):
        evaluate(recipe, None, tmp_path / "out", samplers=["ode"])


def test_columns_of_any_type_are_trained_on_and_evaluated(flux: Path, tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    when, uuid = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC), UUID(int=7)
    columns: dict[str, Any] = {
        "when": when,
        "day": when.date(),
        "time": when.time(),
        "took": timedelta(seconds=1.5),
        "price": Decimal("1.10"),
        "data": b"\x89PNG",
        "image": {"bytes": b"\x89PNG" * 2000, "path": None},
        "none": None,
        "number": float("nan"),
        "box": [[1.0, float("inf")], []],
    }
    plain = {
        "when": "2024-01-02T03:04:05+00:00",
        "day": "2024-01-02",
        "time": "03:04:05",
        "took": 1.5,
        "price": "1.10",
        "data": f"4 bytes, sha256 {sha256(columns['data']).hexdigest()}",
        "image": {"bytes": f"8000 bytes, sha256 {sha256(columns['image']['bytes']).hexdigest()}", "path": None},
        "none": None,
        "number": None,
        "box": [[1.0, None], []],
    }
    recipe = recipe_for(flux, tmp_path / "run")
    recipe.prompts = str(tmp_path / "prompts.parquet")
    rows = [{"prompt": text, **columns} for text in ("red", "blue")]
    parquet.write_table(Table.from_pylist(rows), recipe.prompts)
    recipe.train.prompts_per_iteration = 2
    Trainer(recipe).run()
    assert Trainer(recipe, resume="auto").start == 1
    evaluate(recipe, None, tmp_path / "out", samplers=["ode"], by="when")
    written = (tmp_path / "out" / "scores.jsonl").read_text()
    assert [row["meta"] for row in rows_of(tmp_path / "out")] == [plain] * 6
    metadata = tmp_path / "out" / "ode" / "00000" / "metadata.jsonl"
    assert json.loads(metadata.read_text()) == {"prompt": "red", **plain}
    table = evaluate(recipe, None, tmp_path / "out", samplers=["ode"], by="when")
    assert (tmp_path / "out" / "scores.jsonl").read_text() == written
    assert table is not None and f"| ODE | {plain['when']} | Brightness |" in table
    more = {"id": uuid, "half": np.float16(0.5), "many": np.arange(2), "tensor": torch.ones(1)}
    assert Prompt("x", more).columns() == {"id": str(uuid), "half": 0.5, "many": [0, 1], "tensor": [1.0]}
    with pytest.raises(ValueError, match='prompts: got a set in column "tags" of "red", want plain values'):
        Prompt("red", {"tags": {1}}).columns()


def test_lines_are_appended(tmp_path: Path) -> None:
    def row(prompt: int, sample: int) -> dict[str, Any]:
        return {"sampler": "ode", "prompt_index": prompt, "sample": sample, "scores": {"x": 0.5}}

    scores = Scores(tmp_path, {"seed": 0})
    scores.add([row(0, 0), row(0, 1)])
    inode = scores.path.stat().st_ino
    scores.add([row(1, 0)])
    assert scores.path.stat().st_ino == inode
    again = Scores(tmp_path, {"seed": 0})
    assert again.has("ode", range(1), 2) and not again.has("ode", range(1, 2), 2)
    # Half a prompt is dropped from the file, too.
    again.add([row(1, 0), row(1, 1)])
    assert rows_of(tmp_path) == again.rows == [row(0, 0), row(0, 1), row(1, 0), row(1, 1)]
    # What a reward has dropped is asked for again.
    again.add([row(2, 0) | {"scores": {"x": None}}])
    assert not again.has("ode", range(2, 3), 1) and len(again.rows) == 4
    again.add([])
    reader = Scores(tmp_path, {"seed": 0}, writes=False)
    reader.add([row(2, 0)])
    assert len(reader.rows) == 5 and len(rows_of(tmp_path)) == 4


@pytest.mark.parametrize("damage", [b"garbage\n", b"[1]\n", b'{"sampler": "ode"}\n', b"\xff\xfe\n"])
def test_damaged_scores_are_named(tmp_path: Path, damage: bytes) -> None:
    scores = Scores(tmp_path, {"seed": 0})
    scores.add([{"sampler": "ode", "prompt_index": 0}])
    with scores.path.open("ab") as file:
        file.write(damage)
    with pytest.raises(ValueError, match=r"output: .*scores\.jsonl is damaged in line 2 \("):
        Scores(tmp_path, {"seed": 0})
    (tmp_path / "settings.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"output: .*settings\.json is damaged|output: .*other settings"):
        Scores(tmp_path, {"seed": 0})


def test_what_is_no_folder_and_what_cannot_be_compared_is_refused(flux: Path, tmp_path: Path) -> None:
    recipe = recipe_for(flux, tmp_path / "unused")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output: got .*file, which is a file, want a folder"):
        evaluate(recipe, None, tmp_path / "file")
    rates = EvaluationSettings(samples_per_prompt=1, grid_samples=1, rewards=[tiny.reward("Brightness", win_rate=True)])
    with pytest.raises(ValueError, match=r"evaluation\.samples_per_prompt: got 1, want at least 2"):
        evaluate(replace(recipe, evaluation=rates), None, tmp_path / "out")


def test_a_moved_model_is_the_same_and_a_changed_one_is_not(flux: Path, tmp_path: Path) -> None:
    recipe = recipe_for(flux, tmp_path / "unused")
    evaluate(recipe, None, tmp_path / "out", samplers=["ode"])
    moved = shutil.copytree(flux, tmp_path / "moved")
    there = replace(recipe, model=replace(recipe.model, path=str(moved), checkpointing="full"))
    evaluate(there, None, tmp_path / "out", samplers=["ode"])
    config = moved / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"shift": 2.0', '"shift": 1.0'))
    with pytest.raises(ValueError, match=r"output: .* other settings.*scheduler_config\.json: got"):
        evaluate(there, None, tmp_path / "out", samplers=["ode"])


def test_diversity_is_its_formula() -> None:
    frames = torch.rand(6, 5, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    wanted = frames.double().reshape(2, 3, -1).var(dim=1, correction=0).sqrt().mean()
    assert diversity(frames, 3) == pytest.approx(wanted.item())


def test_diversity_of_accepted_samples_does_not_depend_on_how_many() -> None:
    """Its square is the unbiased variance of the accepted ones, at the scale of `diversity` over all."""
    frames = torch.rand(6, 2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    pixels, every = frames.double().reshape(6, -1), torch.ones(6, dtype=torch.bool)
    assert accepted_diversity(frames, every) == pytest.approx(diversity(frames, 6))
    for kept in ([0, 1, 2, 4], [3, 5]):
        accepted = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(kept), value=True)
        wanted = (pixels[kept].var(dim=0, correction=1) * 5 / 6).sqrt().mean()
        assert accepted_diversity(frames, accepted) == pytest.approx(wanted.item())
    assert accepted_diversity(frames, torch.arange(6) == 2) is accepted_diversity(frames, ~every) is None


def scored(prompt: int, value: float, **changes: Any) -> dict[str, Any]:
    fixed = {"sampler": "ode", "prompt_index": prompt, "prompt": "x", "meta": {}, "diversity": 1.0}
    return fixed | {"scores": {"s": value}} | changes


def test_summary_is_its_formulas() -> None:
    values = [[1.0, 3.0], [2.0, 6.0]]
    rows = [scored(p, value, diversity=p + 1.0) for p, group in enumerate(values) for value in group]
    (row,) = summary(rows)
    assert row["mean"] == 3.0
    assert row["error"] == pytest.approx(stdev([2.0, 4.0]) / 2**0.5)
    assert row["std"] == pytest.approx(stdev([1.0, 3.0, 2.0, 6.0]))
    assert row["within"] == pytest.approx((stdev(values[0]) + stdev(values[1])) / 2)
    assert (row["diversity"], row["prompts"], row["samples"]) == (1.5, 2, 4)


def test_summary_of_accepted_samples() -> None:
    """A prompt without two of them is left out, as it has no spread of them."""
    spreads = [0.25, None, 0.75]
    rows = [scored(p, 1.0, diversity_accepted=one, meta={"tag": p}) for p, one in enumerate(spreads) for _ in range(2)]
    assert summary(rows)[0]["diversity_accepted"] == 0.5
    table = summary(rows, "tag")
    assert [row["diversity_accepted"] for row in table] == [0.5, 0.25, None, 0.75, None]
    assert "| diversity_accepted |" in table_text(table)


def test_values_of_a_column_count_once() -> None:
    """Three prompts of one tag and one of another; a tag may be called "all"."""
    tags, scores = ("all", "all", "all", "counting"), (1.0, 1.0, 0.0, 0.5)
    rows = [
        scored(p, s, sampler=sampler, meta={"tag": tag})
        for sampler in ("ode", "sde")
        for p, (tag, s) in enumerate(zip(tags, scores, strict=True))
        for _ in range(2)
    ]
    table = summary(rows, "tag")
    for sampler in ("ode", "sde"):
        found = [(row["group"], row["mean"], row["prompts"]) for row in table if row["sampler"] == sampler]
        two_thirds = pytest.approx(2 / 3)
        assert found == [
            ("all", 2.5 / 4, 4),
            ("all", two_thirds, 3),
            ("counting", 0.5, 1),
            ("mean over tag", pytest.approx((2 / 3 + 0.5) / 2), 4),
        ]
    assert "| SDE | mean over tag | s | 0.5833 |  |  |  |  | 4 | 8 |" in table_text(table)


def test_command(flux: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.write_recipe(recipe_for(flux, tmp_path / "run"), tmp_path / "tiny.yaml")
    given = ["evaluate", str(recipe), "--checkpoint", str(trained), "--output", str(tmp_path / "out")]
    assert main([*given, "--samplers", "sde", "--by", "colour", "--threads", "1"]) == 0
    assert "| SDE | blue | Brightness |" in capsys.readouterr().out
    for extra, message in (
        (["--samplers", "heun"], "samplers: got ['heun']"),
        (["--by", "size"], 'by: got "size"'),
        (["--weights", "ema"], "weights: got"),
        (["--checkpoint", str(tmp_path)], "checkpoint: got"),
    ):
        assert main([*given[:-1], str(tmp_path / "other"), *extra]) == 1
        assert message in capsys.readouterr().err
    assert main(given[:-2]) == 1
    assert "output: got nothing" in capsys.readouterr().err


def test_one_sample_a_prompt(flux: Path, tmp_path: Path) -> None:
    settings = EvaluationSettings(samples_per_prompt=1, grid_samples=1, rewards=[tiny.reward("Brightness")])
    recipe = replace(recipe_for(flux, tmp_path / "unused"), evaluation=settings)
    evaluate(recipe, None, tmp_path / "out", samplers=["ode"])
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["table"]
    assert (row["within"], row["diversity"], row["samples"]) == (None, None, 3)
    assert row["std"] == pytest.approx(stdev([one["scores"]["Brightness"] for one in rows_of(tmp_path / "out")]))
    with pytest.raises(ValueError, match=r"evaluation.samples_per_prompt: got 1"):
        Trainer(replace(recipe, output_dir=str(tmp_path / "run")))
