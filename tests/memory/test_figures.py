"""Pictures of plans, and the further plans behind them."""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from dancegrpo_fast import drawing
from dancegrpo_fast.memory.pictures import comparisons as _comparisons
from dancegrpo_fast.memory.pictures import figures, which_card, words
from dancegrpo_fast.memory.pictures import timeline as _timeline
from dancegrpo_fast.memory.pictures.comparisons import Point
from dancegrpo_fast.memory.planning.cards import CARDS, MEANT
from dancegrpo_fast.memory.planning.planner import Plan, on_cards, plan
from dancegrpo_fast.memory.planning.settings import GIB, Settings
from dancegrpo_fast.memory.planning.verdict import shortened

from ..patch.models import TINY
from ..tolerances import PREDICTED_BYTES
from .small import tiny

matplotlib = pytest.importorskip("matplotlib")
PILImage = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("collected_once")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Blocks of one kind, which keep some MiB."""
    folder = tmp_path_factory.mktemp("model")
    TINY["qwen"].model(torch.float32).save_config(folder / "transformer")
    sizes = {"height": 512, "width": 512, "group_size": 4, "text_tokens": 64, "gpu_gib": 24}
    # One kernel on all cards, so that what is traced for one serves all.
    return plan(Settings(str(folder), lora=2, lora_dtype="float32", attention="flash", **sizes), advise=False)


@pytest.fixture(scope="module")
def drawn(small: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return figures.draw(small, tmp_path_factory.mktemp("figures") / "made")


def _texts(file: Path) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.parse(file).iter() if e.tag.endswith("}text")]


@pytest.mark.release
def test_every_picture_is_a_png_of_the_stated_width_and_an_svg(drawn: list[Path]) -> None:
    names = ("timeline", "policies", "saved", "sizes", "cards")
    assert [file.name for file in drawn] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for file in drawn[::2]:
        with PILImage.open(file) as image:
            assert image.width == round(drawing.WIDTH * drawing.STYLE["savefig.dpi"])
            assert len(image.convert("L").getcolors()) > 10
    for file in drawn[1::2]:
        assert ElementTree.parse(file).getroot().tag.endswith("}svg")


def test_labels_name_phases_peak_policies_groups_and_sizes(small: Plan, drawn: list[Path]) -> None:
    texts = {file.stem: _texts(file) for file in drawn[1::2]}
    for phase in small.phases:
        assert any(text.startswith(phase.name) for text in texts["timeline"])
    assert any(small.peak.op in text for text in texts["timeline"])
    policies = {label for text in texts["policies"] for label in text.split(", ")}
    assert not any("none is better" in text for text in texts["policies"])
    assert {"none", "full", "attention", "matmul"} <= policies
    assert any("24 GiB that are given" in text for text in texts["policies"])
    assert f"fits the 24 GiB with {24 - small.total_bytes / GIB:.1f} GiB to spare" in texts["policies"]
    assert {"LoRA 2", "LoRA 2, nf4", "all weights", "all weights, 8 GPUs", "in float32", "fits"} <= set(texts["cards"])
    assert {name for name, size in small.saved_by_group.items() if size >> 20} <= set(texts["saved"])
    assert {"512 x 512", "micro-batch", "none"} <= set(texts["sizes"])


def test_timeline_reaches_the_peak_and_wider_phases_take_longer(small: Plan) -> None:
    places, budgets, ends = _timeline.line([_timeline.Strip(p.name, p.seconds, p.timeline) for p in small.phases])
    assert places == sorted(places)
    assert ends[0] == 0
    assert ends[-1] == pytest.approx(1)
    assert max(sum(budget.values()) for budget in budgets) == small.peak_bytes
    widths = [b - a for a, b in itertools.pairwise(ends)]
    ranked = sorted(zip((phase.seconds for phase in small.phases), widths, strict=True))
    assert all(a[1] <= b[1] or a[1] == pytest.approx(b[1]) for a, b in itertools.pairwise(ranked))


def test_labels_of_policies_lie_on_no_other(small: Plan) -> None:
    with matplotlib.rc_context(drawing.STYLE):
        figure = figures.policies(small)
    figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in figure.axes[0].texts if note.get_text() and note.get_zorder() == 5]
    assert len(boxes) >= 4
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)


def test_the_peak_is_marked_and_told(small: Plan) -> None:
    with matplotlib.rc_context(drawing.STYLE):
        figure = figures.timeline(small)
    [panel] = figure.axes
    [dot] = [line for line in panel.lines if line.get_label() == "peak"]
    assert dot.get_ydata() == pytest.approx([small.peak_bytes / GIB])
    told = panel.get_title("left").replace("\n", " ")
    assert f"GiB, {small.peak.name}, {small.peak.op}, {small.peak.module}" in told


def _heavier(plan: Plan, more: int) -> Plan:
    """The same with more weights in every phase."""

    def added(budget: dict[str, int]) -> dict[str, int]:
        return budget | {"parameters": budget.get("parameters", 0) + more}

    phases = [
        replace(phase, budget=added(phase.budget), timeline=tuple((at, added(b)) for at, b in phase.timeline))
        for phase in plan.phases
    ]
    return replace(plan, phases=tuple(phases))


def test_the_timeline_is_cut_above_what_always_rests(small: Plan) -> None:
    heavy = _heavier(small, 15 * GIB)
    with matplotlib.rc_context(drawing.STYLE):
        plain, cut = figures.timeline(small), figures.timeline(heavy)
    assert not any("cut: below" in text.get_text() for text in plain.axes[0].texts)
    [panel] = cut.axes
    [said] = [text.get_text() for text in panel.texts if "cut: below" in text.get_text()]
    floor = float(said.split()[2])
    rests = next(phase.bytes for phase in heavy.phases if phase.name == "weights") / GIB
    assert floor < rests
    cut.draw_without_rendering()

    def height(y: float) -> float:
        return float(panel.transAxes.inverted().transform(panel.transData.transform((0, y)))[1])

    # As the text says it with three digits.
    assert height(floor) == pytest.approx(_timeline.BELOW, abs=0.02)
    assert height(panel.get_ylim()[1]) == pytest.approx(1.0)
    # Straight above it.
    top = panel.get_ylim()[1]
    assert height((rests + top) / 2) == pytest.approx((height(rests) + height(top)) / 2)
    ticks = [tick for tick in panel.get_yticks() if tick > 0]
    assert len(ticks) >= 3 and min(ticks) > rests * 0.9


def test_the_three_answers_are_told(small: Plan) -> None:
    def told(gib: float) -> str:
        return words.verdict(replace(small, settings=small.settings.changed(gpu_gib=gib)))

    tensors, total = small.peak_bytes / GIB, small.total_bytes / GIB
    assert told(total + 1) == f"fits the {total + 1:g} GiB with 1.0 GiB to spare"
    assert told(total - 0.1).startswith("in the shaded margin of the ") and "within the guesses, 0.1" in told(
        total - 0.1
    )
    assert told(tensors).startswith("does not fit the ")
    assert words.verdict(replace(small, settings=small.settings.on("l4"))).startswith("fits the L4 with ")


def test_policies_are_told_in_a_word() -> None:
    assert words.in_a_word("none") == "none"
    assert words.in_a_word("full + block inputs on the host") == "full + host"
    assert (
        words.in_a_word("2 x attention, 5 x none, 4 x attention + block inputs on the host") == "attention 6/11 + host"
    )


def test_each_card_is_planned_at_its_own_speed(small: Plan) -> None:
    found = on_cards(small.settings, ("3060", "h100"))
    for name, there in found.items():
        alone = plan(small.settings.on(name), advise=False)
        assert (there.peak_bytes, there.seconds, there.policy) == (alone.peak_bytes, alone.seconds, alone.policy)
    assert found["3060"].seconds > found["h100"].seconds


def test_cells_say_whether_a_card_holds_it(small: Plan) -> None:
    plans = {name: replace(small, settings=small.settings.on(name)) for name in MEANT}
    heavy = {name: _heavier(one, round(50 * GIB)) for name, one in plans.items()}
    # Tensors of all but the context, and no margin.
    size = CARDS["h100"].gib * GIB - small.peak_bytes - GIB
    close = {
        name: replace(_heavier(one, round(size)), margins={"fragmentation": 2 * GIB}) for name, one in plans.items()
    }
    shown = {"light": plans, "heavy": heavy, "close": close}
    with matplotlib.rc_context(drawing.STYLE):
        drawn = which_card.draw(small.settings, [which_card.Column(*item) for item in shown.items()])
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in drawn.axes[0].texts}
    h100, last = MEANT.index("h100"), len(MEANT) - 1
    assert cells[0, 0] == "none" and cells[1, last] == "none"
    spare = CARDS["4070"].gib - heavy["4070"].total_bytes / GIB
    assert cells[1, 0] == f"\N{MINUS SIGN}{-spare:.1f} GiB"
    looks = [patch.get_hatch() for patch in drawn.axes[0].patches[: 3 * len(MEANT)]]
    states = [looks[i * len(MEANT) : (i + 1) * len(MEANT)] for i in range(3)]
    fits, guesses, no = (look.get("hatch") for look in which_card.LOOKS.values())
    assert states[0] == [fits] * len(MEANT)
    assert states[1] == [no if CARDS[name].gib < 50 else fits for name in MEANT]
    assert states[2][h100] == guesses and set(states[2][:h100]) == {no} and set(states[2][h100 + 1 :]) == {fits}


def test_titles_say_what_changes_the_bytes(small: Plan) -> None:
    small = {"lora": 32, "quantization": "nf4", "optimizer": "adamw8bit", "offload": ("block_inputs", "vae")}
    said = words.subject(Settings("hunyuan-video", frames=53, guidance_scale=6.0, vae_tiling="on", **small))
    for part in ("53 frames", "CFG 6", "LoRA 32 on an nf4 base", "VAE in tiles", "adamw8bit", "block inputs + VAE"):
        assert part in said
    shared = words.subject(Settings("hunyuan-video", fsdp=8, rollout_replica=True))
    assert "FSDP full shard over 8 GPUs" in shared and "rollout replica" in shared


def test_titles_are_broken_evenly_and_between_parts() -> None:
    parts = [f"part {i} of it" for i in range(9)]
    lines = drawing.broken(", ".join(parts))
    assert len(lines) == 2
    assert ", ".join(line.removesuffix(",") for line in lines).split(", ") == parts
    assert max(map(len, lines)) - min(map(len, lines)) <= len(parts[0]) + 2
    assert drawing.broken("short") == ["short"]


def test_a_unet_is_drawn_block_by_block(tmp_path: Path) -> None:
    model, _ = tiny("unet")
    model.save_config(tmp_path / "unet")  # type: ignore[operator]  # diffusers' method
    found = plan(Settings(str(tmp_path), height=64, width=64, checkpointing="none", gpu_gib=24), advise=False)
    for phase in found.phases:
        if phase.name.startswith("replay"):
            heights = [sum(budget.values()) for _, budget in phase.timeline]
            assert len(set(heights)) > 3 and max(heights) == phase.bytes
            assert phase.module
    forward = next(phase for phase in found.phases if phase.name == "replay forward")
    kept = [budget.get("saved", 0) for _, budget in forward.timeline]
    assert kept == sorted(kept)


def test_front_is_what_none_beats() -> None:
    points = [Point("a", 1, 9.0), Point("b", 2, 9.0), Point("c", 2, 5.0), Point("d", 3, 6.0), Point("e", 4, 1.0)]
    assert [point.label for point in _comparisons.front(points)] == ["a", "c", "e"]


def test_policy_names_are_counted_once() -> None:
    assert shortened("15 x attention, 5 x none, 25 x attention") == "40 x attention, 5 x none"
    assert shortened("full + block inputs on the host") == "full + block inputs on the host"


def test_sizes_are_ones_the_models_can_have() -> None:
    for settings in (
        Settings("hunyuan-video", frames=53, height=480, width=640),
        Settings("sd14", height=512, width=512),
        Settings("wan21-1.3b", frames=17, height=240, width=416),
    ):
        columns, rows = _comparisons.axes_of(settings)
        for column, row in itertools.product(columns, rows):
            assert math.prod(map(int, _comparisons._extent(settings.changed(**column, **row)))) > 0


def _corners(small: Plan, names: Sequence[str] = ("none", "attention", "full")) -> tuple[Any, list[Any]]:
    columns, rows = _comparisons.axes_of(small.settings)
    ends = [small.settings.changed(**rows[i], **columns[i]) for i in (0, -1)]
    ends.insert(1, small.settings)
    return small.settings, [_comparisons._corner(at, names) for at in ends]


def test_bytes_between_planned_sizes_are_those_of_a_plan(small: Plan) -> None:
    settings, corners = _corners(small)
    middle = settings.changed(micro_batch=2)
    for name in ("none", "full"):
        between = _comparisons._between(corners, middle, name)
        exact = plan(middle.changed(checkpointing=name), advise=False)
        assert {phase.name for phase in exact.phases} == set(between)
        for phase in exact.phases:
            assert between[phase.name] == pytest.approx(phase.bytes, rel=PREDICTED_BYTES), phase.name


def test_less_memory_never_gets_a_cheaper_policy(small: Plan) -> None:
    names = _comparisons.LADDER
    settings, corners = _corners(small, names)
    most = max(_comparisons._between(corners, settings, "none").values())
    least = max(_comparisons._between(corners, settings, "full").values())
    limits = [most - (most - least) * i / 8 for i in range(9)]
    cells = [_comparisons.cell(corners, settings, limit, names) for limit in limits]
    assert cells[0].label == "none"
    assert [cell.level for cell in cells] == sorted(cell.level for cell in cells)
    assert all(cell.bytes <= limit for cell, limit in zip(cells, limits, strict=True))
    assert cells[-1].level >= 2
    assert _comparisons.cell(corners, settings, 0, names).level == math.inf
