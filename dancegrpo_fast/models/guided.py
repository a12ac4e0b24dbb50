"""Classifier-free guidance as a second half of the batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

Conditioning = Mapping[str, Tensor]

# Before the name of a tensor: the negative prompt's, where each prompt has one of its own.
NEGATIVE = "negative_"


def guided_batch(
    latents: Tensor, times: Tensor, conditioning: Conditioning, unconditional: Conditioning | None
) -> tuple[Tensor, Tensor, Conditioning]:
    """The 2B rows of a guided call: the prompts', then as many of the unconditional row; B rows where that is None.

    What `unconditional` lacks is the prompt's own negative, and where it has none (an image that both halves see) the
    same in both halves.
    """
    if unconditional is None:
        return latents, times, conditioning
    both = {}
    for name, value in conditioning.items():
        if not name.startswith(NEGATIVE):
            own = conditioning.get(NEGATIVE + name, value)
            both[name] = torch.cat([value, unconditional.get(name, own).expand_as(value)])
    return torch.cat([latents, latents]), torch.cat([times, times]), both


def split_guided(output: Tensor, unconditional: Conditioning | None) -> tuple[Tensor, Tensor | None]:
    """The halves of what `guided_batch` was made for."""
    if unconditional is None:
        return output, None
    conditional, uncond_output = output.chunk(2)
    return conditional, uncond_output
