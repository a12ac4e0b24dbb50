"""`rewards:` of a recipe."""

import json
import math
from dataclasses import dataclass, field
from typing import Any


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
        args: keyword arguments of its constructor.
        label: what metrics and tables call it; null: its name, with what is done to its scores.
    """

    name: str
    weight: float = 1.0
    threshold: float | None = None
    win_rate: bool = False
    label: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"rewards.weight: got {self.weight}, want a number other than 0")
        if self.win_rate and self.threshold is not None:
            raise ValueError(f"rewards.win_rate: got true beside threshold {self.threshold:g}, want one of the two")
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
