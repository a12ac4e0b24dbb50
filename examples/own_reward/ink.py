"""A reward of your own: a file beside the recipe, named there as `module:callable`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dancegrpo_fast.rewards import RewardInput


class Ink:
    """How close the light part of a picture comes to a wanted share: 0 at best, less the further off it is.

    Args:
        share: of the pixels' brightness, from 0 to 1.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share: got {share}, want a number from 0 to 1")
        self.share = share

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Scores `[N]` for frames `[N, T, 3, H, W]` in [0, 1]."""
        return -(inputs.frames.mean(dim=(1, 2, 3, 4)) - self.share).abs()

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Optional: refuses prompts before anything is sampled. `meta` has the other columns of the prompts' file."""
        for prompt, columns in zip(prompts, meta, strict=True):
            if "digit" not in columns:
                raise ValueError(f'prompts: got "{prompt}" without a column "digit"')
