"""The atlas: its settings are what the command line takes, its answers those of plans, and it is made bit by bit."""

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("jsonargparse")

from bench.memory import atlas
from bench.memory.usual import NOTHING, TRAINED, Away, sizes
from dancegrpo_fast.cli.memory import parse
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.cards import CARDS, MEANT
from dancegrpo_fast.memory.planning.planner import plan
from dancegrpo_fast.memory.planning.settings import Settings
from dancegrpo_fast.memory.planning.verdict import GUESSES, NO, YES

from ..tolerances import AUTO_FILLS

WHERE = {name: name for name in ("torch", "diffusers", "peft", "git", "date")}


def test_sizes_are_some_that_the_models_can_have() -> None:
    for model in specs.names():
        for size in sizes(model):
            specs.latent_grid(specs.resolve(model), *size)
    entries = atlas.entries()
    assert len(set(map(atlas._of, entries))) == len(entries)
    assert {entry.place.model for entry in entries} == set(specs.names())


@pytest.mark.parametrize("model", ["flux-dev", "wan21-1.3b"])
def test_commands_ask_for_what_was_planned(model: str) -> None:
    for entry in (entry for entry in atlas.entries() if entry.place == atlas.Place(model, sizes(model)[-1])):
        asked = entry.settings
        for other in entry.trained.away:
            changed = asked.changed(**other.changes)
            words = [*atlas.command(asked).split(), *" ".join(atlas.options(changed, asked)).split(), "--card", "4090"]
            assert parse(words[2:]).settings == changed.on("4090")


@pytest.mark.release
def test_answers_are_those_of_plans() -> None:
    """The first of what may be away that fits, or what leaves the most room."""
    # One kernel on all cards, so that what is traced for one serves all.
    asked = Settings("flux-dev", height=256, width=256, lora=16, group_size=1, attention="flash")
    away = (NOTHING, Away("away", {"offload": ("denoiser", "vae")}), Away("less", {"offload": ("vae",)}))
    found = atlas.answers(asked, away, ("4090", "5090", "h100"))
    assert {name: (answer.verdict.state, answer.away) for name, answer in found.items()} == {
        "4090": (GUESSES, 1),
        "5090": (YES, 0),
        "h100": (YES, 0),
    }
    for name, answer in found.items():
        planned = plan(asked.changed(**away[answer.away].changes).on(name), advise=False)
        verdict = next(each for each in planned.cards if each.gib == CARDS[name].gib)
        assert (answer.verdict, answer.plan.peak.name) == (verdict, planned.peak.name)
    [state, spare, *_, policy, i, peak] = atlas._short(found["4090"])
    assert (state, i, peak) == (GUESSES, 1, found["4090"].plan.peak.name) and spare < 0 and "swap" not in policy
    planned = found["5090"].plan
    swapped = replace(planned, settings=planned.settings.changed(blocks_to_swap=3))
    assert atlas._short(found["5090"]._replace(plan=swapped))[3] == "none; blocks_to_swap 3"
    # At the rates of each.
    assert found["h100"].verdict.seconds < found["5090"].verdict.seconds


class Now:
    """Runs in this process, at once."""

    def __init__(self, *arguments: object, **options: object) -> None:
        del arguments, options

    def __enter__(self) -> "Now":
        return self

    def __exit__(self, *error: object) -> None:
        del error

    def submit(self, function: Any, *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def test_what_is_made_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, asked = tmp_path / "atlas.json", []

    def planned(settings: Settings, away: object) -> dict[str, atlas.Answer]:
        asked.append(settings)
        if settings.lora and settings.model == "sd14":
            raise ValueError("lora: got 32, want less")
        return {}

    monkeypatch.setattr(atlas, "ProcessPoolExecutor", Now)
    monkeypatch.setattr(atlas, "answers", planned)
    each = sum(len(trained.counts) for trained in TRAINED)
    atlas.make(file, "sd14 ", 1, WHERE)
    assert len(asked) == each
    atlas.make(file, "flux-dev 1 x 512", 1, WHERE)
    assert len(asked) == 2 * each and {settings.model for settings in asked[each:]} == {"flux-dev"}
    shown = capsys.readouterr().out
    assert "lora: got 32, want less" in shown and "what is left: 0 sizes" in shown
    rows = atlas.read(file)
    # In the order of the page, whatever was made first.
    assert [row["model"] for row in rows] == ["flux-dev"] * each + ["sd14"] * each
    assert "refused" in rows[each] and "refused" not in rows[0]

    atlas.make(file, "sd14", 1, WHERE)
    assert len(asked) == 2 * each
    # A setting that is made of something else, and one that is not asked any more.
    rows[0]["made_of"] = "another"
    atlas.write(file, [*rows, rows[1] | {"model": "forgotten"}])
    atlas.make(file, "flux-dev 1 x 512", 1, WHERE)
    assert len(asked) == 2 * each + 1
    again = atlas.read(file)
    assert "forgotten" not in {row["model"] for row in again} and again[0]["made_of"] != "another"


def test_what_a_setting_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = atlas.entries()[:2]
    before = first.made_of
    assert before == first.made_of != second.made_of
    monkeypatch.setattr(atlas, "planner", lambda: "another version")
    assert first.made_of != before
    monkeypatch.undo()
    monkeypatch.setattr(atlas, "MEANT", MEANT[1:])
    assert first.made_of != before


def test_the_committed_atlas() -> None:
    known = {atlas._of(entry) for entry in atlas.entries()}
    data = json.loads(atlas.FILE.read_text(encoding="utf-8"))
    assert [card["name"] for card in data["cards"]] == list(MEANT)
    states = (NO, GUESSES, YES)
    for row in data["rows"]:
        assert atlas._identity(row) in known
        assert ("answers" in row) != ("refused" in row)
        seen = []
        for name in MEANT if "answers" in row else ():
            state, spare, seconds, policy, away, peak = row["answers"][name]
            assert (state == YES) == (spare >= 0) and seconds > 0 and policy and peak and row["away"][away]
            seen.append(states.index(YES if spare >= -AUTO_FILLS else state))
        # What fits a card fits every larger one.
        assert seen == sorted(seen)
