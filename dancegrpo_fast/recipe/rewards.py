"""`rewards:` of a recipe."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .checks import check_fields, expanded

# Arguments in which `~` and variables are replaced, as they are folders, files or names on the hub.
PATHS = ("path", "base", "clip", "head", "tokenizer")


@dataclass
class RewardSettings:
    """One reward.

    Args:
        name: a reward of this package, or `module:callable`: of a file beside the recipe or in the working folder, for
            the commands of `dancegrpo-fast`, or of an installed package.
        weight: factor of its advantages; less than 0 makes it small.
        threshold: score 1 above it and 0 at or below it.
        win_rate: the score is the share of the other samples of its prompt's group that it beats, ties half. The mean
            of every group is 1/2, so report the plain score beside it.
        on_error: what follows where it cannot score a sample. "stop": the run ends. "retry": it is asked once more for
            those samples, then the run ends. "drop": it is asked once more, then they are left out of everything: of
            their groups' statistics, of best-of-N, and of the update.
        max_dropped: with "drop", the largest share of an iteration's samples (of an evaluation's) that it may leave out
            before the run ends.
        args: keyword arguments of its constructor.
        label: what metrics and tables call it; null: its name, with what is done to its scores.
    """

    name: str
    weight: float = 1.0
    threshold: float | None = None
    win_rate: bool = False
    on_error: Literal["stop", "retry", "drop"] = "stop"
    max_dropped: float = 0.1
    label: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields("rewards", self)
        places = {name: place for name, place in self.args.items() if name in PATHS and isinstance(place, str)}
        self.args = self.args | {name: expanded(f"rewards.args.{name}", place) for name, place in places.items()}
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"rewards.weight: got {self.weight}, want a number other than 0")
        if self.win_rate and self.threshold is not None:
            raise ValueError(f"rewards.win_rate: got true beside threshold {self.threshold:g}, want one of the two")
        if not 0 <= self.max_dropped < 1:
            raise ValueError(f"rewards.max_dropped: got {self.max_dropped}, want at least 0, less than 1")
        try:
            json.dumps(self.args, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rewards.args: got {self.args}, want plain values: {error}") from error

    def title(self) -> str:
        """What metrics and tables call it."""
        if self.label is not None:
            return self.label
        name = self.name.rpartition(":")[2]
        if self.win_rate:
            return f"{name}_win_rate"
        return name if self.threshold is None else f"{name}>{self.threshold:g}"
