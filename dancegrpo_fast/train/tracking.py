"""Trackers: who else is told of a run, beside its own files. One that fails costs a warning, never the run."""

import json
import tempfile
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from ..install import install_line
from ..processes import Processes
from ..recipe import Recipe
from ..run.sheets import save_pages

PROJECT = "dancegrpo_fast"
# Of the run's folder: what each tracker calls the run, so that a resumed one continues there.
IDS = "trackers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that accelerate does not know, that is not installed, or is named twice."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    absent = {str(one) for one in LoggerType} - {str(one) for one in get_available_trackers()}
    for place, name in enumerate(names):
        if name not in LOGGER_TYPE_TO_CLASS or name in names[:place]:
            raise ValueError(f"tracking: got {list(names)}, want each once, of {sorted(LOGGER_TYPE_TO_CLASS)}")
        if name in absent:
            line = install_line("train") if name == "tensorboard" else f"pip install {name}"
            raise ValueError(f'tracking: got "{name}", which is not installed; want {line}')


class Tracking:
    """The trackers of a run, in its first process.

    Args:
        recipe: `recipe.tracking` names them.
        root: of the run's files; a tracker's own lie there where it asks for a place.
        start: iterations that are done; more than 0 continues what the trackers have.
        processes: of the run.

    Raises:
        ValueError: a tracker does not start.
    """

    def __init__(self, recipe: Recipe, root: Path, start: int, processes: Processes) -> None:
        self._fps, self._trackers = recipe.sampler.fps, list[Any]()
        refused = None
        if processes.is_main:
            ids = json.loads((root / IDS).read_text(encoding="utf-8")) if (root / IDS).is_file() else {}
            for name in recipe.tracking:
                try:
                    self._trackers.append(_started(name, recipe, root, start, ids))
                # What a tracker raises is its own.
                except Exception as error:
                    refused = f'tracking: got "{name}", which does not start ({error}), want it to, or without it'
                    break
            if ids:
                write_text(root / IDS, json.dumps(ids, indent=1))
        for text in processes.collect([refused]):
            if text is not None:
                raise ValueError(text)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among some values, at an iteration."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._each(step, lambda tracker: tracker.log(numbers, step=step))

    def show(self, step: int, name: str, picture: Path) -> None:
        """A sheet of samples at an iteration, to the trackers of `SHOW`.

        Args:
            step: the iteration.
            name: of the series.
            picture: a PNG, animated where samples are videos.
        """
        self._each(step, lambda tracker: SHOW.get(tracker.name, _not_shown)(tracker, step, name, picture, self._fps))

    def finish(self) -> None:
        """Nothing is told any more."""
        self._each(None, lambda tracker: tracker.finish())
        self._trackers = []

    def _each(self, step: int | None, call: Callable[[Any], object]) -> None:
        for tracker in self._trackers:
            try:
                call(tracker)
            # A network that is gone, a disk that is full: the run's own files have all of it.
            except Exception as error:
                when = "at the end" if step is None else f"at iteration {step}"
                warnings.warn(f"tracking: {tracker.name} failed {when}, the run goes on: {error}", stacklevel=2)


def _started(name: str, recipe: Recipe, root: Path, start: int, ids: dict[str, str]) -> Any:
    """A tracker of accelerate; `ids` gets what it calls the run."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind, known = LOGGER_TYPE_TO_CLASS[name], ids.get(name)
    config = {"config": recipe.as_dict()}
    own = known or uuid.uuid4().hex
    options: dict[str, dict[str, Any]] = {
        # What a killed run logged after its checkpoint is logged again.
        "tensorboard": {"purge_step": start + 1 if start else None},
        "wandb": {"name": recipe.name, "dir": str(root), "id": own, "resume": "allow", **config},
        "swanlab": {"experiment_name": recipe.name, "logdir": str(root / name), "id": own[:21], "resume": "allow"}
        | config,
        "trackio": {"name": f"{recipe.name}-{own[:8]}", "resume": "allow", **config},
        "mlflow": {"run_name": recipe.name, "run_id": known},
        "aim": {"run_hash": known},
        "clearml": {"task_name": recipe.name},
        "dvclive": {"dir": str(root / name), "resume": start > 0},
    }
    # TensorBoard's folder is named so, whatever the project.
    project = name if name == "tensorboard" else PROJECT
    tracker = kind(project, *([str(root)] if kind.requires_logging_directory else []), **options.get(name, {}))
    tracker.start()
    if name == "mlflow":
        own = tracker.tracker.info.run_id
        tracker.log_artifact(str(root / "recipe.json"))
    elif name == "aim":
        own = tracker.tracker.hash
    if name in ("wandb", "swanlab", "trackio", "mlflow", "aim"):
        ids[name] = own
    return tracker


def _tensorboard(tracker: Any, step: int, name: str, picture: Path, fps: float | None) -> None:
    from PIL.PngImagePlugin import PngImageFile
    from tensorboard.compat.proto.summary_pb2 import Summary

    with PngImageFile(picture) as file:
        width, height = file.size
    # The file as it is, which a browser moves: `add_video` needs a moviepy of before 2024.
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture.read_bytes())
    tracker.tracker.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)


def _media(tracker: Any, step: int, name: str, picture: Path, fps: float | None) -> None:
    """For modules with classes `Image` and `Video` of files, and runs with `log`."""
    import importlib

    from PIL import ImageSequence
    from PIL.PngImagePlugin import PngImageFile

    module: Any = importlib.import_module(tracker.name)
    with PngImageFile(picture) as file:
        pages = [page.convert("RGB") for page in ImageSequence.Iterator(file)]
    if len(pages) == 1:
        tracker.log({name: module.Image(str(picture))}, step=step)
        return
    with tempfile.TemporaryDirectory() as folder:
        clip = save_pages(Path(folder, f"{picture.stem}.gif"), pages, fps)
        tracker.log({name: module.Video(str(clip))}, step=step)


def _mlflow(tracker: Any, step: int, name: str, picture: Path, fps: float | None) -> None:
    tracker.log_artifact(str(picture), "samples")


def _not_shown(tracker: Any, step: int, name: str, picture: Path, fps: float | None) -> None:
    pass


SHOW: dict[str, Callable[[Any, int, str, Path, float | None], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _media,
    "swanlab": _media,
    "trackio": _media,
    "mlflow": _mlflow,
}
