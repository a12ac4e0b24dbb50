"""The planner against what other people measured on GPUs (`bench/memory/public_rows.jsonl`), within stated bounds."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from bench.memory import public
from bench.memory.extras import EXTRAS
from bench.memory.public import LOW, Published, markdown, result, rows, summary, unexplained, within
from bench.repository import RESULTS
from bench.rows import read

from ..release import release_but

pytestmark = pytest.mark.usefixtures("collected_once")

WHERE = {name: name for name in ("torch", "diffusers", "git", "date")}
PLANNED = [row for row in rows() if not row.missing()]
# Traces of large models take seconds of a core each; one of each part stays.
QUICK = [
    next(row for row in PLANNED if row.part == part and row.settings["model"] == model)
    for part, model in (("A", "flux-dev"), ("B", "sd14"), ("C", "sd35-medium"))
]


def ids(row: Published) -> str:
    return f"{rows().index(row)} {row.part} {row.what}"


@pytest.mark.parametrize("row", release_but(QUICK, PLANNED), ids=ids)
def test_a_plan_is_within_its_parts_bound_or_has_a_cause(row: Published) -> None:
    found = result(row, WHERE)
    assert not unexplained([found]), found
    # What the run had besides explains it, where the number is no estimate.
    assert within(found, found["off_with_besides"]) or "published as" in row.cause or not row.besides, found


def test_rows_are_whole() -> None:
    assert len({(row.part, row.what, row.source, str(row.settings)) for row in rows()}) == len(rows())
    for row in rows():
        assert row.source.startswith("https://") and row.measured > 0
        assert bool(row.not_planned) != bool(row.settings and row.run), row
        assert set(row.without) <= set(public.TAKEN)
    assert {name for row in rows() for name in row.besides} == set(EXTRAS)


def made(**values: Any) -> dict[str, Any]:
    row = vars(Published("A", "a run", 2.0, "allocated", "https://example.org"))
    return (
        {k: v for k, v in row.items() if k != "not_planned"}
        | {"missing": None, "environment": WHERE, "off": 0.0, "off_with_besides": 0.0}
        | values
    )


def test_the_table_shows_what_cannot_be_planned_and_what_is_low() -> None:
    low = made(what="low", planned=1.8, with_besides=1.8, off=-0.1, off_with_besides=-0.1)
    told = made(what="told", planned=1.8, with_besides=1.9, off=-0.1, off_with_besides=-0.05, cause="a mask")
    told["besides"] = ("square attention mask",)
    lost = made(what="lost", missing="the planner does not know it", off=None)
    page = markdown([low, told, lost])
    assert "not planned: the planner does not know it" in page
    cells = next(line for line in page.splitlines() if line.startswith("| A. ")).split(" | ")
    assert cells[1:6] == ["3", "1", "-10.0 %", "10.0 %", "-10.0 %"]
    assert "1.90 (-5.0 %)" in page and EXTRAS["square attention mask"].text in page
    assert unexplained([low, told, lost]) == [low]
    assert LOW < 0.1


def test_a_row_of_unknown_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"part": "Z", "what": "x", "measured": 1, "kind": "allocated", "source": ""}\n')
    monkeypatch.setattr(public, "FILE", file)
    with pytest.raises(ValueError, match="got part Z"):
        rows.__wrapped__()


def test_settings_that_the_planner_lacks_are_said() -> None:
    row = Published("C", "x", 1.0, "reserved", "", {"model": "flux-dev", "no_such": 1}, ("training",))
    assert row.missing() == "the planner has no setting no_such"
    assert "does not know other" in Published("C", "x", 1.0, "reserved", "", {"model": "other"}).missing()


def test_the_page_has_the_summary_of_the_results() -> None:
    found = read(RESULTS / "memory-public.jsonl")
    assert [(row["part"], row["what"]) for row in found] == [(row.part, row.what) for row in rows()]
    page = (RESULTS.parents[1] / "docs" / "how-far-off.md").read_text()
    assert "\n".join(summary(found)) in page
    assert not unexplained(found)
