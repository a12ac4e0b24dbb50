"""What the trainer needs of a model family."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn

from ..prompts import Prompt
from ..recipe import SamplerSettings
from ..transitions import TransitionTable
from .guided import Conditioning


class GeneratorModel(Protocol):
    """A denoiser with its way to encode prompts, predict and decode.

    Attributes:
        denoiser: the network that is trained.
        latent_shape: one sample's latents, as the denoiser and the kernels see them.
        gradient_sync: what the recipe's `train.gradient_sync` came to, "update" or "call".
        decodes_x0: of the last step's outcome its estimate of x0 is decoded, else the last latents.
    """

    denoiser: nn.Module
    latent_shape: tuple[int, ...]
    gradient_sync: str
    decodes_x0: ClassVar[bool]

    def at(self, sampler: SamplerSettings) -> "GeneratorModel":
        """The same model for samples of other settings."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Conditioning tensors, one row per prompt of those the model was loaded for; rows do not depend on others."""
        ...

    def encodes_with_vae(self, prompts: Sequence[Prompt]) -> bool:
        """Whether `encode` will run the VAE, which has to be on the device then."""
        ...

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        """One row for the second half of a guided batch, or None where the family or the scale needs none."""
        ...

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        """The sampler's table; `deterministic` asks for the family's ODE with the same steps."""
        ...

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Model output at `latents` `[B, *latent_shape]` and `times` `[B]`, and the unconditional one."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[B, T, 3, H, W]`, float32 in [0, 1] on the 8-bit grid."""
        ...

    def tile_vae(self, size: int | None) -> None:
        """Decodes in tiles of so many pixels, one sample after another, or whole."""
        ...

    def save(self, denoiser: nn.Module, folder: Path) -> None:
        """Writes the trained weights as diffusers reads them: a full denoiser, or LoRA weights alone."""
        ...
