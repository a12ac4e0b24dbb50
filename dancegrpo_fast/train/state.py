"""What a checkpoint holds of a run: put in and taken out here."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..processes import Processes
from ..run import checkpoint
from ..run.changes import Change, within
from ..run.folder import RunDirectory
from ..run.identity import check_model
from ..shards import like
from .ema import MovingAverage
from .finite import check_finite
from .optimizer import Optimizer


@dataclass
class State:
    """Trained weights, their average, the optimiser, torch's generators; and whose run it is.

    Attributes:
        identity: of the recipe, its prompts and its model.
    """

    identity: Mapping[str, Any]
    processes: Processes
    optimizer: Optimizer
    average: MovingAverage | None

    def save(self, directory: RunDirectory, iteration: int, keep: int, **facts: Any) -> None:
        """Writes a checkpoint, with `facts` in its state, and removes all but the newest `keep`; of every process.

        Raises:
            RuntimeError: a value is not finite; nothing is written.
        """
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": self.optimizer.weights,
            "optimizer": self.optimizer.tensors(),
        }
        if self.average is not None:
            groups["ema"] = self.average.values
        check_finite(groups, self.processes, iteration, directory.newest())
        groups["rng"] = rng_tensors()
        state = {**self.identity, **self._surroundings(), **facts}
        checkpoint.save(directory.checkpoints, iteration, groups, state, self.processes)
        if self.processes.is_main:
            checkpoint.prune(directory.checkpoints, keep)

    def restore(self, folder: Path, accepted: Collection[str], changed: Collection[str]) -> list[Change]:
        """Puts everything back as a checkpoint has it; each process reads its part.

        An average that the checkpoint lacks starts at its weights; an optimiser of another kind, or one whose
        arguments now ask for other states, starts anew.

        Args:
            folder: of the checkpoint.
            accepted: fields that may differ, or "all".
            changed: those of the recipe that do.

        Returns:
            How its model differs.

        Raises:
            ValueError: it is damaged, of another model, or holds other parameters.
        """
        groups, state = checkpoint.stored(folder, self.processes)
        found, weights = check_model(folder, state, self.identity, accepted), groups["model"]
        mine, theirs = (
            {name: list(one.shape) for name, one in held.items()} for held in (self.optimizer.weights, weights)
        )
        if other := next((name for name in mine | theirs if mine.get(name) != theirs.get(name)), None):
            trained, kept = (f"of shape {held[other]}" if other in held else "no such one" for held in (mine, theirs))
            raise ValueError(f"resume: got {trained} for {other}, which is trained here, want {kept}, as in {folder}")
        with torch.no_grad():
            for name, weight in self.optimizer.weights.items():
                weight.copy_(like(weights[name], weight))
        self.optimizer.round_masters()
        if self.average is not None:
            self.average.load(groups.get("ema") or weights)
        states = groups.get("optimizer", {})
        others = any(within(name, "train.optimizer_args") for name in changed) and not self.optimizer.fits(states)
        if "train.optimizer" not in changed and not others:
            self.optimizer.load(states)
        set_rng_tensors({name: value[...] for name, value in groups["rng"].items()})
        for name, now in self._surroundings().items():
            if state.get(name) != now and self.processes.is_main:
                warnings.warn(
                    f"resume: {folder} was made with {name} {state.get(name)}, this is {now}; "
                    "results can differ from an uninterrupted run in the last bits",
                    stacklevel=2,
                )
        return found

    def _surroundings(self) -> dict[str, Any]:
        """What may differ in a continuation, with a warning."""
        device = self.processes.device
        return {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "processes": self.processes.name,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }


def rng_tensors() -> dict[str, Tensor]:
    """States of torch's generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_tensors(states: Mapping[str, Tensor]) -> None:
    """Puts back what `rng_tensors` returned."""
    torch.set_rng_state(states["cpu"])
    for name, value in states.items():
        if name.startswith("cuda:") and torch.cuda.is_available():
            torch.cuda.set_rng_state(value, name)
