"""PickScore, a CLIP ViT-H/14 tuned on what people picked (Kirstain et al., 2023, arXiv 2305.01569)."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .base import RewardInput
from .clip import LAION_H, ClipReward, clip_model, load_towers
from .frames import Sampling

_FACTORS = {"cosine": 1.0, "logit": 100.0, "logit/26": 100.0 / 26.0}


class PickScore(ClipReward):
    """Scaled cosine of the tuned CLIP's image and text embeddings; the prompt is taken as it stands.

    Args:
        path: The `CLIPModel`: hub name or local folder.
        tokenizer: Hub name or local folder.
        scale: "logit": 100 x cosine, 100 being the published logit scale (about 19 to 24); "logit/26": that over 26,
            as several trainers do; "cosine": the bare cosine.
        dtype, device, batch, frames: As for `ClipScore`.

    Raises:
        ValueError: An argument is out of range, or something does not load.
    """

    def __init__(
        self,
        path: str | Path = "yuvalkirstain/PickScore_v1",
        tokenizer: str | Path = LAION_H,
        scale: Literal["logit", "logit/26", "cosine"] = "logit",
        dtype: str = "float32",
        device: str | torch.device | None = None,
        batch: int = 32,
        frames: Sampling = "all",
    ) -> None:
        if scale not in _FACTORS:
            raise ValueError(f"scale: got {scale!r}, want one of {list(_FACTORS)}")
        self.factor = _FACTORS[scale]
        super().__init__(load_towers(clip_model, path, tokenizer, dtype, device), batch, frames)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return scaled cosines, float32 [B].

        Raises:
            ValueError: frames are not floats [B, T, 3, H, W] in [0, 1], are too few, or prompts are not B.
        """
        return self.factor * self.cosines(inputs, inputs.prompts)
