"""Sheets of samples, which are read back to the bit, the pictures of a run, and its lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image

from dancegrpo_fast import drawing
from dancegrpo_fast.run import pictures, sheets
from dancegrpo_fast.run.words import closing_line, duration, progress_line, read_rows

LONG = "a cinematic wide shot of an astronaut who rides a horse across a field of lavender under two moons, 35 mm film"


def evaluated(root: Path, prompts: Sequence[str], grid: Sequence[int], *, diversity: float = 0.2) -> Path:
    """A run of one iteration with random samples `[S, T, H, W]` of each prompt."""
    samples, frames, height, width = grid
    rows = []
    for iteration in (0, 1):
        for sampler in ("ode", "sde"):
            values = torch.rand(len(prompts), samples, frames, 3, height, width)
            sheets.save_samples(root / "samples", iteration, sampler, values, prompts, 4.0)
            rows.append({"iteration": iteration, "sampler": sampler, "diversity": diversity, "score": 0.5 * iteration})
    (root / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"iteration": 1, "reward/a": 0.5, "reward_std/a": 0.1, "clip_fraction": 0.25, "zero_std_groups": 0}
    metrics["seconds"] = {"sample": 60.0, "reward": 1.5, "train": 30.0}
    (root / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    return root


@pytest.mark.parametrize("shape", [(2, 3, 1, 16, 16), (1, 1, 1, 100, 30), (3, 2, 4, 12, 20), (1, 2, 1, 300, 300)])
def test_samples_are_read_back_to_the_bit(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [LONG, "\u72d0\u72f8", "a digit"][: shape[0]]
    levels = torch.randint(0, 256, (*shape[:3], 3, *shape[3:]))
    path = sheets.save_samples(tmp_path / "made", 7, "sde", levels / 255, prompts, 8.0)
    assert path.name == "000007-sde.png"
    with monkeypatch.context() as patch:
        # Sheets of large samples have more pixels than Pillow opens.
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        found = sheets.read_samples(path)
    assert torch.equal(torch.from_numpy(found.cells).long(), levels.permute(0, 1, 2, 4, 5, 3))
    assert (found.prompts, found.fps) == (prompts, 8.0)
    with Image.open(path) as file:
        assert getattr(file, "n_frames", 1) == shape[2]
        assert file.height >= shape[0] * sheets.LEAST * min(shape[3:]) / max(shape[3:])


def test_a_picture_that_is_no_sheet_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "000000-ode.png")
    with pytest.raises(ValueError, match=r"run: got .*000000-ode\.png without a layout"):
        sheets.read_samples(tmp_path / "000000-ode.png")


def test_what_prompts_share_is_said_once() -> None:
    assert sheets.short_names(["a digit one", "a digit two up"]) == ("a digit", ["one", "two up"])
    assert sheets.short_names(["same", "same"]) == ("", ["same", "same"])
    assert sheets.short_names(["a red cube"]) == ("", ["a red cube"])
    assert sheets.short_names(["", "a"]) == ("", ["", "a"])


@pytest.mark.parametrize("prompts", [["cat"], [LONG, "cat"]])
def test_text_lies_beside_the_cells(prompts: list[str]) -> None:
    """Black cells stay black: no label, heading or note lies on them, however long it is."""
    cells = torch.zeros(len(prompts), 2, 1, 16, 16, 3, dtype=torch.uint8).numpy()
    panels = [sheets.Panel(f"before\n{LONG}", cells, ["1", "2"]) for _ in range(2)]
    [page], place = sheets.sheet(panels, prompts, note=LONG)
    size = place["height"] * place["scale"]
    for row in range(len(prompts)):
        for column in range(2):
            left, top = (place[edge] + i * (size + place["gap"]) for edge, i in (("left", column), ("top", row)))
            assert page.crop((left, top, left + size, top + size)).getextrema() == ((0, 0),) * 3
    # White around everything: nothing is cut off.
    width, height = page.size
    for edge in ((0, 0, 2, height), (width - 2, 0, width, height), (0, 0, width, 2), (0, height - 2, width, height)):
        assert page.crop(edge).getextrema() == ((255, 255),) * 3


def test_a_run_of_images_is_drawn(tmp_path: Path) -> None:
    (samples, curves), refused = pictures.draw(evaluated(tmp_path, [LONG, "cat"], (1, 1, 16, 16)))
    assert refused is None
    assert (samples.name, curves.name) == ("before_after.png", "curves.png")
    for path in (samples, curves):
        with Image.open(path) as file:
            assert len(file.convert("L").getcolors()) > 10


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"no picture", "not a PNG"), (b"cut", "whole sample file")]
)
def test_curves_are_drawn_without_samples(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A run may have been begun by an earlier version, or have lost a file; that ends no run that trained."""
    root = evaluated(tmp_path, ["cat"], (1, 1, 16, 16))
    file = root / "samples" / "000000-ode.png"
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
    [curves], refused = pictures.draw(root)
    assert curves.name == "curves.png" and refused is not None and message in refused and str(file) in refused


def test_a_run_with_other_rewards_on_the_way_is_drawn(tmp_path: Path) -> None:
    """As one that was continued with another recipe."""
    root = evaluated(tmp_path, ["cat"], (1, 1, 16, 16))
    added = {
        "metrics": [{"iteration": 2, "reward/b": 0.2, "reward_std/b": 0.1, "seconds": {}}],
        "evaluations": [{"iteration": 2, "sampler": s, "diversity": 0.1, "other": 0.7} for s in ("ode", "sde")],
    }
    for name, rows in added.items():
        with (root / f"{name}.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    with matplotlib.rc_context(drawing.STYLE):
        figure: Any = pictures._curves(read_rows(root / "metrics.jsonl"), read_rows(root / "evaluations.jsonl"))
    legends = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in figure.axes[:2]]
    assert legends == [["a", "b"], ["score", "other"]]
    assert "other 0.700 -> 0.700, diversity" in closing_line(root, "name")
    (root / "evaluations.jsonl").write_text("")
    assert "name: ratio_first_update_max_dev" in closing_line(root, "name")


def test_a_run_of_videos_is_drawn_and_moves(tmp_path: Path) -> None:
    (strips, moving, _), _ = pictures.draw(evaluated(tmp_path, ["a dog", "a cat"], (2, 20, 12, 12)))
    with Image.open(moving) as file:
        assert file.n_frames == 20
    with Image.open(strips) as file:
        assert file.width < 2 * pictures.FRAMES * 2 * sheets.LEAST


def test_iterations_have_whole_ticks(tmp_path: Path) -> None:
    root = evaluated(tmp_path, ["cat"], (1, 1, 16, 16))
    with matplotlib.rc_context(drawing.STYLE):
        figure: Any = pictures._curves(read_rows(root / "metrics.jsonl"), read_rows(root / "evaluations.jsonl"))
    figure.draw_without_rendering()
    for panel in figure.axes:
        assert all(tick == round(tick) for tick in panel.get_xticks())
        assert panel.get_xlabel() == "iteration" and panel.get_ylabel() and panel.get_legend()
        label, legend = panel.xaxis.label.get_window_extent(), panel.get_legend().get_window_extent()
        assert not label.overlaps(legend)


def test_lines_of_a_run(tmp_path: Path) -> None:
    assert [duration(seconds) for seconds in (0, 92.9, 36_610)] == ["0:00:00", "0:01:32", "10:10:10"]
    root = evaluated(tmp_path, ["cat"], (1, 1, 16, 16), diversity=0.0)
    [row] = read_rows(root / "metrics.jsonl")
    assert progress_line(row, 10, 92.0) == (
        " 1/10  a 0.500 (std 0.100)  clipped 25%  equal groups 0  sample 60.00s reward 1.50s train 30.00s  left 0:01:32"
    )
    # One sample of each prompt has no diversity, and nothing is divided by it.
    assert "score 0.000 -> 0.500, diversity 0.000 -> 0.000, ratio_first" in closing_line(root, "name")
    assert "1 iterations in 0:01:31" in closing_line(root, "name")
    # Of samples that a judge accepts, where it accepted some in both.
    rows = read_rows(root / "evaluations.jsonl")
    for before, wanted in ((0.25, "of accepted samples 0.250 -> 0.125 (50% left)"), (None, "0.000 -> 0.000, ratio")):
        for row, spread in zip(rows, (before, before, 0.125, 0.125), strict=True):
            row |= {"diversity_accepted": spread, "accepted_prompts": 1}
        (root / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert wanted in closing_line(root, "name")
        assert "score 0.000 -> 0.500, diversity 0.000" in closing_line(root, "name")
    figure: Any = pictures._curves(read_rows(root / "metrics.jsonl"), rows)
    assert "ODE, accepted samples" in figure.axes[2].get_legend_handles_labels()[1]
    with pytest.raises(ValueError, match=r"want the directory of a run \(metrics\.jsonl is missing\)"):
        closing_line(tmp_path / "none", "name")
