"""What the trainer needs of a model family."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..compiling import Compiled
from ..prompts import Prompt
from ..recipe import SamplerSettings
from ..transitions import TransitionTable
from .guided import Conditioning


class GeneratorModel(Protocol):
    """A denoiser with its way to encode prompts, predict and decode.

    Attributes:
        denoiser: the network that is trained, or several as `Experts`.
        latent_shape: one sample's latents, as the denoiser and the kernels see them.
        gradient_sync: what the recipe's `train.gradient_sync` came to, "update" or "call".
        passes: what the recipe's `train.passes` came to, 2, "retain" or "reweight".
        compiled: how it is called where it is compiled, else None.
        decodes_x0: of the last step's outcome its estimate of x0 is decoded, else the last latents.
    """

    denoiser: nn.Module
    latent_shape: tuple[int, ...]
    gradient_sync: str
    passes: Literal[2, "retain", "reweight"]
    compiled: Compiled | None
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
        """One row for the second half of a guided batch, or None where the family or the scale needs none.

        What differs between prompts is in `encode` instead, as `guided_batch` finds it.
        """
        ...

    def table(self, sampler: SamplerSettings, *, deterministic: bool = False) -> TransitionTable:
        """The sampler's table; `deterministic` asks for the family's ODE with the same steps."""
        ...

    def turns(self, table: TransitionTable) -> Sequence[int]:
        """For each step which of the model's denoisers takes it, from 0 in the order of the steps."""
        ...

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
        expert: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Model output at `latents` `[B, *latent_shape]` and `times` `[B]`, and the unconditional one.

        Of a model with several denoisers `expert` is what `turns` has for the times.
        """
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


def decode(model: GeneratorModel, latents: Tensor, rows: int) -> Tensor:
    """Frames of all samples, decoded `rows` at a time: float32 `[B, T, 3, H, W]` on the CPU."""
    with torch.no_grad():
        return torch.cat([model.decode(part).cpu() for part in latents.split(rows)])


def check_frames(frames: Tensor, latents: Tensor) -> None:
    """Raises RuntimeError where frames, which `latents` were decoded to, are no numbers."""
    if bad := int(frames.isnan().flatten(1).any(dim=1).sum()):
        where = "their latents" if bool(latents.isnan().any()) else "what the VAE makes of finite latents"
        raise RuntimeError(f"decode: got {bad} of {len(frames)} samples with pixels that are no numbers, from {where}")


@contextmanager
def of_evaluation() -> Iterator[None]:
    """A ValueError about a sampler's settings says that they are evaluation's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"evaluation: {error}") from error
