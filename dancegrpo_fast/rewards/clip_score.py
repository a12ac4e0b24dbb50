"""CLIP score: how well an image fits its prompt, as torchmetrics has it, without the factor 100.

Hessel et al. (2021) put "A photo depicts " before the prompt, multiply by 2.5 and end at 0.
"""

from pathlib import Path

import torch
from torch import Tensor

from .base import RewardInput
from .clip import ClipReward, clip_model, load_towers
from .frames import Sampling


class ClipScore(ClipReward):
    """Cosine of CLIP's image and text embeddings, in [-1, 1].

    Pixels are prepared with CLIP's own mean and standard deviation at the size that the model's configuration names.

    Args:
        path: A `CLIPModel`: hub name or local folder.
        tokenizer: Hub name or local folder; None: beside the model.
        dtype: Of the towers: "float32", "bfloat16" or "float16"; normalisation and cosine are float32.
        device: None: the current CUDA device if there is one, else the CPU.
        batch: Images, or prompts, in one call of a tower.
        frames: Of a video: "first", "middle", "all" or a count of uniformly spaced ones; the score is their mean.

    Raises:
        ValueError: An argument is out of range, or something does not load.
    """

    def __init__(
        self,
        path: str | Path = "openai/clip-vit-large-patch14",
        tokenizer: str | Path | None = None,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        batch: int = 32,
        frames: Sampling = "all",
    ) -> None:
        super().__init__(
            load_towers(clip_model, path, path if tokenizer is None else tokenizer, dtype, device), batch, frames
        )

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return cosines, float32 [B].

        Raises:
            ValueError: frames are not floats [B, T, 3, H, W] in [0, 1], are too few, or prompts are not B.
        """
        return self.cosines(inputs, inputs.prompts)
