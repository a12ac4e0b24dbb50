"""LAION's aesthetic predictor: five linear layers on CLIP ViT-L/14 (Schuhmann et al., 2022, arXiv 2210.08402)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import RewardInput
from .clip import ClipReward, clip_model, load_towers, loaded
from .frames import Sampling
from .pixels import openai_pixels

_HUB_FILE = "aesthetic-model.pth"


class AestheticHead(nn.Module):
    """Linear 1024, 128, 64, 16, 1 with nothing but dropout between them; unit vectors [..., width] to [...].

    Its parameters are named as in the published `sac+logos+ava1-l14-linearMSE.pth`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # the places of dropout, which does nothing here, keep the published numbering
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeds: Tensor) -> Tensor:
        """Return ratings, float32 [...]."""
        ratings: Tensor = self.layers(embeds)
        return ratings.squeeze(-1)


class Aesthetic(ClipReward):
    """How beautiful people find an image, about 1 to 10, whatever the prompt.

    The pixels are those of LAION's own script, whose torchvision cuts the square of some formats one pixel from where
    transformers' processor does, which DDPO's and Flow-GRPO's scripts take.

    Args:
        path: The `CLIPModel` whose image tower is used: hub name or local folder.
        head: The five layers: a local `.pth` file in the published layout, or a hub name with `aesthetic-model.pth`
            (the default is a copy of LAION's).
        dtype: Of the image tower: "float32", "bfloat16" or "float16"; normalisation and layers are float32.
        device: None: the current CUDA device if there is one, else the CPU.
        batch: Images in one call of the tower.
        frames: Of a video: "first", "middle", "all" or a count of uniformly spaced ones; the score is their mean.

    Raises:
        ValueError: An argument is out of range, or something does not load or does not fit the CLIP.
    """

    def __init__(
        self,
        path: str | Path = "openai/clip-vit-large-patch14",
        head: str | Path = "trl-lib/ddpo-aesthetic-predictor",
        dtype: str = "float32",
        device: str | torch.device | None = None,
        batch: int = 32,
        frames: Sampling = "all",
    ) -> None:
        super().__init__(load_towers(_image_tower, path, None, dtype, device), batch, frames, openai_pixels)
        self.head = AestheticHead(self.towers.width)
        loaded("head", head, lambda place: self.head.load_state_dict(_weights(place)))
        self.head.eval().requires_grad_(False).to(self.towers.device)

    def to(self, device: str | torch.device) -> "Aesthetic":
        """Move tower and layers to `device`, where they stay until moved again, and return self."""
        self.head.to(device)
        super().to(device)
        return self

    @torch.no_grad()
    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return ratings, float32 [B].

        Raises:
            ValueError: frames are not floats [B, T, 3, H, W] in [0, 1], are too few, or prompts are not B.
        """
        embeds = self.embeddings(inputs)
        ratings: Tensor = self.head.to(embeds.device)(embeds)
        return ratings.mean(dim=1).cpu()


def _image_tower(path: str | Path) -> Any:
    model = clip_model(path)
    del model.text_model, model.text_projection
    return model


def _weights(place: str | Path) -> dict[str, Tensor]:
    if not Path(place).is_file():
        from huggingface_hub import hf_hub_download

        place = hf_hub_download(str(place), _HUB_FILE)
    state: dict[str, Tensor] = torch.load(place, map_location="cpu", weights_only=True)
    return state
