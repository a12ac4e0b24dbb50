"""Pictures of plans, and the further plans behind them."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from dancegrpo_fast.memory.pictures import comparisons as _comparisons
from dancegrpo_fast.memory.pictures import drawing as _drawing
from dancegrpo_fast.memory.pictures import figures
from dancegrpo_fast.memory.pictures import timeline as _timeline
from dancegrpo_fast.memory.pictures.comparisons import Point
from dancegrpo_fast.memory.planning.planner import Phase, Plan, plan
from dancegrpo_fast.memory.planning.settings import GIB, Settings

from ..patch.models import TINY
from ..tolerances import PREDICTED_BYTES
from .small import tiny

pytest.importorskip("matplotlib")
PILImage = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("collected_once")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Blocks of one kind, which keep some MiB."""
    folder = tmp_path_factory.mktemp("model")
    TINY["qwen"].model(torch.float32).save_config(folder / "transformer")
    return plan(
        Settings(
            str(folder), height=512, width=512, group_size=4, text_tokens=64, lora=2, lora_dtype="fp32", gpu_gib=24
        ),
        advise=False,
    )


@pytest.fixture(scope="module")
def drawn(small: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return figures.draw(small, tmp_path_factory.mktemp("figures") / "made")


def _texts(file: Path) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.parse(file).iter() if e.tag.endswith("}text")]


def test_every_picture_is_a_png_of_the_stated_width_and_an_svg(drawn: list[Path]) -> None:
    names = ("timeline", "policies", "saved", "sizes")
    assert [file.name for file in drawn] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for file in drawn[::2]:
        with PILImage.open(file) as image:
            assert image.width == round(_drawing.WIDTH * _drawing.DPI)
            assert len(image.convert("L").getcolors()) > 10
    for file in drawn[1::2]:
        assert ElementTree.parse(file).getroot().tag.endswith("}svg")


def test_labels_name_phases_peak_policies_groups_and_sizes(small: Plan, drawn: list[Path]) -> None:
    texts = {file.stem: _texts(file) for file in drawn[1::2]}
    for phase in small.phases:
        assert any(text.startswith(phase.name) for text in texts["timeline"])
    assert any(small.peak.op in text for text in texts["timeline"])
    policies = {label for text in texts["policies"] for label in text.split(", ")}
    assert {"none", "full", "attention", "matmul"} <= policies
    assert any("24 GiB are given" in text for text in texts["policies"])
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
    import matplotlib

    with matplotlib.rc_context(_drawing.STYLE):
        figure = figures.policies(small)
    figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in figure.axes[0].texts if note.get_text() and note.get_zorder() == 5]
    assert len(boxes) >= 4
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)


def _made_up(small: Plan, peaks: Sequence[float], seconds: Sequence[float], gpu: float) -> Plan:
    """Phases with peaks of so many GiB, with a long name at each."""
    module = "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0"
    phases = []
    for i, (peak, duration) in enumerate(zip(peaks, seconds, strict=True)):
        budgets = [{"saved": round(share * peak * GIB)} for share in (0.4, 1.0, 0.7)]
        moments = tuple(zip((0.2, 0.5, 0.8), budgets, strict=True))
        phases.append(Phase(f"phase {i}", budgets[1], duration, "aten._scaled_dot_product_backward", module, moments))
    return dataclasses.replace(small, settings=small.settings.changed(gpu_gib=gpu), phases=tuple(phases))


@pytest.mark.parametrize(
    ("peaks", "seconds", "gpu"),
    [
        ((7.46, 5, 5), (1, 1, 1), 24),  # at the left, under much room
        ((5, 5, 23.9), (1, 5, 1), 24),  # at the right, just below the capacity
        ((76, 79, 70), (1, 1, 1), 80),
        ((20, 300, 20), (0, 0, 0), 80),  # above every device
        ((30, 31, 31), (1, 9, 9), 34),
        ((1, 1, 1), (1, 1, 1), 24),
    ],
)
def test_label_of_the_peak_hides_nothing(
    small: Plan, peaks: tuple[float, ...], seconds: tuple[float, ...], gpu: float
) -> None:
    import matplotlib

    with matplotlib.rc_context(_drawing.STYLE):
        drawn = figures.timeline(_made_up(small, peaks, seconds, gpu))
    drawn.draw_without_rendering()
    [panel] = drawn.axes
    [note] = [text for text in panel.texts if text.get_text().startswith("peak")]
    box, inside = note.get_window_extent(), panel.get_window_extent()
    assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    others = [text for text in panel.texts if text is not note and text.get_text()]
    others += [*panel.get_xticklabels(), *panel.get_yticklabels(), panel.title, panel._left_title, panel.yaxis.label]
    for other in others:
        assert not other.get_text() or not box.overlaps(other.get_window_extent()), other.get_text()
    to_data = panel.transData.inverted().transform
    (left, bottom), (right, top) = to_data((box.x0, box.y0)), to_data((box.x1, box.y1))
    for line in panel.lines:
        ys = set(line.get_ydata())
        assert len(ys) > 1 or not bottom < ys.pop() < top
    inner = [(left + i * (right - left) / 40, bottom + j * (top - bottom) / 10) for i in range(41) for j in range(11)]
    for stack in panel.collections:
        for path in stack.get_paths():
            assert not path.contains_points(inner).any()


def test_titles_say_what_changes_the_bytes(small: Plan) -> None:
    settings = Settings(
        "hunyuan-video",
        frames=53,
        cfg=6.0,
        lora=32,
        base="nf4",
        vae_tiling=True,
        offload=("block_inputs", "vae"),
        optimizer="adamw_8bit",
    )
    said = figures._subject(settings)
    for part in ("53 frames", "CFG 6", "LoRA 32 on an nf4 base", "VAE in tiles", "adamw 8bit", "block inputs + VAE"):
        assert part in said
    shared = figures._subject(Settings("hunyuan-video", fsdp=8, replica=True))
    assert "FSDP full shard over 8 GPUs" in shared and "rollout replica" in shared


def test_titles_are_broken_evenly_and_between_parts() -> None:
    parts = [f"part {i} of it" for i in range(9)]
    lines = _drawing.broken(", ".join(parts))
    assert len(lines) == 2
    assert ", ".join(line.removesuffix(",") for line in lines).split(", ") == parts
    assert max(map(len, lines)) - min(map(len, lines)) <= len(parts[0]) + 2
    assert _drawing.broken("short") == ["short"]


def test_a_unet_is_drawn_block_by_block(tmp_path: Path) -> None:
    model, _ = tiny("unet")
    model.save_config(tmp_path / "unet")  # type: ignore[operator]  # diffusers' method
    found = plan(Settings(str(tmp_path), height=64, width=64, policy="none", gpu_gib=24), advise=False)
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
    assert figures._short("15 x attention, 5 x none, 25 x attention") == "40 x attention + 5 x none"
    assert figures._short("full + block inputs on the host") == "full + block inputs on the host"


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
        exact = plan(middle.changed(policy=name), advise=False)
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
