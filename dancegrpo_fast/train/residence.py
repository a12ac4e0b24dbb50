"""Which models are on the device: all, or of those that a recipe offloads the one that runs."""

from collections.abc import Sequence
from typing import Any

import torch

from ..models import Conditioning, GeneratorModel
from ..prompts import Prompt
from ..rewards import RewardSet


class Residence:
    """Keeps what a phase does not use in host memory, where a recipe says so.

    Args:
        offload: `train.offload`, of which "denoiser", "vae" and "rewards" are looked at.
        model: its decoder is `model.vae`.
        device: where they run.

    Raises:
        ValueError: the model has no such decoder.
    """

    def __init__(self, offload: Sequence[str], model: GeneratorModel, device: torch.device) -> None:
        self._vae = getattr(model, "vae", None)
        if "vae" in offload and self._vae is None:
            raise ValueError(f'train.offload: got "vae" for {type(model).__name__}, which has no decoder to move')
        self._offload, self._model, self._device = tuple(offload), model, device
        self._rewards: list[RewardSet] = []

    def add(self, rewards: RewardSet) -> None:
        """Rewards that are part of the run; `use` of one set sends the others away."""
        self._rewards.append(rewards)

    def use(self, needed: str | RewardSet) -> None:
        """Moves to the device what runs next, "denoiser", "vae" or a set of rewards; what else is offloaded leaves."""
        parts: list[tuple[Any, bool]] = []
        if "denoiser" in self._offload:
            parts.append((self._model.denoiser, needed == "denoiser"))
        if "vae" in self._offload:
            parts.append((self._vae, needed == "vae"))
        if "rewards" in self._offload:
            parts += [(one, one is needed) for one in self._rewards]
        # First away, so that two are never there together; sets may share a model, which then comes back.
        for part, wanted in sorted(parts, key=lambda pair: pair[1]):
            part.to(self._device if wanted else "cpu")

    def encode(self, prompts: Sequence[Prompt], model: GeneratorModel | None = None) -> Conditioning:
        """What the model makes of the prompts; the VAE is there where it has to see pictures of theirs.

        Args:
            prompts: that it was loaded for.
            model: the same at another size; None: as it is trained.
        """
        model = model or self._model
        if model.encodes_with_vae(prompts):
            self.use("vae")
        return model.encode(prompts)
