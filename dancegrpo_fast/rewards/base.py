"""What a reward receives and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardInput:
    """Decoded samples and what is known about their prompts.

    Attributes:
        frames: float32 [B, T, 3, H, W] in [0, 1], values on the 8-bit grid; an image has T = 1.
        prompts: B prompts.
        group: int64 [B], index of the prompt group of each sample.
        meta: B mappings, the extra columns of the prompts file, for example `{"digit": 3}`.
        fps: Frames per second of a video, None for images.
    """

    frames: Tensor
    prompts: Sequence[str]
    group: Tensor
    meta: Sequence[Mapping[str, Any]]
    fps: float | None = None

    def of(self, samples: Sequence[int]) -> "RewardInput":
        """The same of some samples."""
        rows = torch.tensor(samples, dtype=torch.int64)
        return RewardInput(
            self.frames[rows.to(self.frames.device)],
            [self.prompts[sample] for sample in samples],
            self.group[rows.to(self.group.device)],
            [self.meta[sample] for sample in samples],
            self.fps,
        )


class UnscoredError(Exception):
    """Raised by a reward that can score some samples and not others; `rewards[].on_error` says what follows.

    A score that is not finite says the same without a reason.

    Args:
        scores: floats [B]; those of the samples in `reasons` are not looked at.
        reasons: why a sample has none, by its place in the input.
    """

    def __init__(self, scores: Tensor, reasons: Mapping[int, str]) -> None:
        shown = [f"sample {sample}: {reasons[sample]}" for sample in sorted(reasons)[:3]]
        super().__init__("; ".join(shown) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""))
        self.scores, self.reasons = scores, dict(reasons)


class Reward(Protocol):
    """A function from samples to scores; higher is better."""

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return one score per sample, float32 [B], or raise, `UnscoredError` for some; there is no default score."""
        ...


@runtime_checkable
class Checking(Protocol):
    """What a reward that cannot score every prompt may offer besides: others are refused before a run samples."""

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a prompt that it cannot score, of B prompts and their columns, as in `RewardInput`."""
        ...


@runtime_checkable
class Movable(Protocol):
    """What a reward that holds a model may offer besides, so that its memory is free while it is not asked."""

    def to(self, device: str | torch.device) -> Any:
        """Move every weight to `device`; the next call runs there."""
        ...
