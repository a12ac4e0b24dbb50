"""Trackers: what they are told, over a resumed run, and what one that fails costs."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking as accelerates
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dancegrpo_fast.recipe import EvaluationSettings, Recipe
from dancegrpo_fast.run.sheets import save_pages
from dancegrpo_fast.train.loop import Trainer
from dancegrpo_fast.train.tracking import Tracking, check_trackers

from . import tiny

SCORE = "evaluation/ode/Brightness"


class Told(accelerates.GeneralTracker):
    """Keeps what it is told, and fails when asked to."""

    name = "told"
    requires_logging_directory = False
    fails: tuple[str, ...] = ()
    runs: list["Told"]

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options
        self.rows: dict[int, dict[str, Any]] = {}
        self.ended = False

    def _fail(self, when: str) -> None:
        if when in self.fails:
            raise ConnectionError(f"no network to {when}")

    def start(self) -> None:
        self._fail("start")
        self.runs.append(self)

    @property
    def tracker(self) -> "Told":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        raise AssertionError

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self._fail("log")
        self.rows.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.ended = True


class Wandb(Told):
    """Stands for wandb's."""

    name = "wandb"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Told]]:
    """The runs that were told of; files of pictures and clips are read when they are given."""
    runs: list[Told] = []

    def frames(path: str) -> list[Image.Image]:
        with Image.open(path) as file:
            return [frame.copy() for frame in ImageSequence.Iterator(file)]

    monkeypatch.setattr(Told, "runs", runs, raising=False)
    for kind in (Told, Wandb):
        monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    available = [*accelerates.get_available_trackers(), "wandb"]
    monkeypatch.setattr(accelerates, "get_available_trackers", lambda: available)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=frames, Video=frames))
    yield runs


def recipe_for(flux: Path, output: Path, iterations: int, tracking: list[str]) -> Recipe:
    settings = EvaluationSettings(
        every=1, samples_per_prompt=2, grid_samples=1, samplers=["ode"], rewards=[tiny.reward("Brightness")]
    )
    small = {"prompts_per_iteration": 1, "micro_batch": 2, "group_size": 2, "num_steps": 3}
    return tiny.make_recipe(flux, output, iterations=iterations, evaluation=settings, tracking=tracking, **small)


def test_numbers_and_pictures_arrive_over_a_resumed_run(flux: Path, tmp_path: Path, told: list[Told]) -> None:
    """One axis, and nothing twice."""
    names, output = ["tensorboard", "wandb", "told"], tmp_path / "run"
    Trainer(recipe_for(flux, output, 1, names)).run()
    # What a killed run logged after its last checkpoint.
    trainer = Trainer(recipe_for(flux, output, 3, names), resume="auto")
    trainer.tracking.log(2, {"reward/Brightness": -1.0})
    trainer.tracking.finish()
    Trainer(recipe_for(flux, output, 2, names), resume="auto").run()

    rows = {row["iteration"]: row for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())}
    measured = [json.loads(line)["Brightness"] for line in (output / "evaluations.jsonl").read_text().splitlines()]
    found = EventAccumulator(str(output / "tensorboard")).Reload()
    rewards = {one.step: one.value for one in found.Scalars("reward/Brightness")}
    assert rewards == pytest.approx({step: row["reward/Brightness"] for step, row in rows.items()})
    assert [one.value for one in found.Scalars(SCORE)] == pytest.approx(measured)
    for picture in found.Images("samples/ode"):
        assert picture.encoded_image_string == (output / "samples" / f"{picture.step:06d}-ode.png").read_bytes()
    assert [picture.step for picture in found.Images("samples/ode")] == [0, 1, 2]

    wandb = [run for run in told if run.name == "wandb"]
    assert {(run.project, run.options["id"], run.options["resume"]) for run in wandb} == {
        ("dancegrpo_fast", json.loads((output / "trackers.json").read_text())["wandb"], "allow")
    }
    assert all(run.options["config"]["seed"] == 0 and run.options["name"] == "tiny" for run in wandb)
    logged = {step: row for run in wandb for step, row in run.rows.items()}
    assert [logged[step][SCORE] for step in (0, 1, 2)] == measured
    assert logged[2]["learning_rate"] == rows[2]["learning_rate"]
    assert logged[2]["seconds/train"] == rows[2]["seconds"]["train"]
    assert [len(logged[step]["samples/ode"]) for step in (0, 1, 2)] == [1, 1, 1]
    assert all(run.ended for run in told)


def test_a_tracker_that_fails_costs_a_warning(
    flux: Path, tmp_path: Path, told: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Told, "fails", ("log",))
    monkeypatch.setattr(Wandb, "fails", ())
    with pytest.warns(
        UserWarning, match=r"tracking: told failed at iteration [01], the run goes on: no network to log"
    ):
        Trainer(recipe_for(flux, tmp_path / "run", 1, ["told", "wandb"])).run()
    assert (tmp_path / "run" / "model").is_dir()
    assert [sorted(run.rows) for run in told] == [[], [0, 1]]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_clip_is_shown_with_its_frames(tmp_path: Path, told: list[Told]) -> None:
    pages = [Image.new("RGB", (8, 6), (level, 0, 0)) for level in (0, 100, 200)]
    picture = save_pages(tmp_path / "000004-sde.png", pages, 4.0)
    recipe = tiny.recipe_of(
        family="flux", path=".", kind="ode", num_steps=2, eta=0.0, height=8, width=8, fps=4.0, prompts="none",
        iterations=1, prompts_per_iteration=1, group_size=2, micro_batch=1, learning_rate=0.1, tracking=["wandb"],
    )  # fmt: skip
    alone = SimpleNamespace(is_main=True, collect=list)
    tracking = Tracking(recipe, tmp_path, 0, alone)  # type: ignore[arg-type]  # two of its parts
    tracking.show(4, "samples/sde", picture)
    (run,) = told
    shown = run.rows[4]["samples/sde"]
    assert [frame.convert("RGB").getpixel((0, 0))[0] for frame in shown] == [0, 100, 200]
    assert {frame.info["duration"] for frame in shown} == {250}


def test_what_cannot_be_told_is_refused_before_any_work(
    flux: Path, tmp_path: Path, told: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    for names, message in (
        (["tensorbord"], r"tracking: got \['tensorbord'\], want each once, of \['aim'"),
        (["told", "told"], r"tracking: got \['told', 'told'\], want each once"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(recipe_for(flux, tmp_path / "run", 1, names))
    monkeypatch.setattr(accelerates, "get_available_trackers", list)
    for name, line in (("mlflow", "pip install mlflow"), ("tensorboard", r"pip.* install .*\[train\]")):
        with pytest.raises(ValueError, match=rf'tracking: got "{name}", which is not installed; want {line}'):
            check_trackers([name])
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(Told, "fails", ("start",))
    with pytest.raises(ValueError, match=r'tracking: got "told", which does not start \(no network to start\)'):
        Trainer(recipe_for(flux, tmp_path / "run", 1, ["told"]))
