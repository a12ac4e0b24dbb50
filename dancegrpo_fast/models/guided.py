"""Classifier-free guidance as a second half of the batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

Conditioning = Mapping[str, Tensor]


def guided_batch(
    latents: Tensor, times: Tensor, conditioning: Conditioning, unconditional: Conditioning | None
) -> tuple[Tensor, Tensor, Conditioning]:
    """The 2B rows of a guided call: the prompts', then as many of the unconditional row; B rows where that is None.

    What `unconditional` lacks (an image that both halves see) is the same in both halves.
    """
    if unconditional is None:
        return latents, times, conditioning
    both = {
        name: torch.cat([value, unconditional[name].expand_as(value) if name in unconditional else value])
        for name, value in conditioning.items()
    }
    return torch.cat([latents, latents]), torch.cat([times, times]), both


def split_guided(output: Tensor, unconditional: Conditioning | None) -> tuple[Tensor, Tensor | None]:
    """The halves of what `guided_batch` was made for."""
    if unconditional is None:
        return output, None
    conditional, uncond_output = output.chunk(2)
    return conditional, uncond_output
