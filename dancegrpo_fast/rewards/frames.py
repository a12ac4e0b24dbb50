"""Which frames of a video a reward of single images looks at, and their 8-bit pixels."""

from typing import Literal

import torch
from torch import Tensor

from .base import RewardInput

Sampling = Literal["first", "middle", "all"] | int


def check_sampling(frames: Sampling) -> Sampling:
    """Return `frames`.

    Raises:
        ValueError: it is neither "first", "middle", "all" nor a count of at least 1.
    """
    if isinstance(frames, int) and not isinstance(frames, bool):
        known = frames >= 1
    else:
        known = frames in ("first", "middle", "all")
    if not known:
        raise ValueError(f'frames: got {frames!r}, want "first", "middle", "all" or a count of at least 1')
    return frames


def sampled_indices(frames: Sampling, length: int) -> list[int]:
    """Return which of `length` frames `frames` means.

    "first" is frame 0, "middle" frame `length // 2`. A count k takes the middle of each of k equal parts,
    `floor((2 i + 1) length / (2 k))`, so that 1 is "middle" and `length` is "all".

    Raises:
        ValueError: more frames are wanted than there are.
    """
    if frames == "first":
        return [0]
    if frames == "all":
        return list(range(length))
    count = 1 if isinstance(frames, str) else frames
    if count > length:
        raise ValueError(f"frames: got {count}, want at most the {length} of a sample")
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def sampled_bytes(inputs: RewardInput, frames: Sampling) -> Tensor:
    """Return the sampled frames as pixels, uint8 [B, F, 3, H, W] on the device of `inputs.frames`.

    Raises:
        ValueError: frames are not floats [B, T, 3, H, W] in [0, 1], or prompts are not B.
    """
    given = inputs.frames
    if given.ndim != 5 or given.shape[2] != 3 or not given.is_floating_point() or 0 in given.shape[1:]:
        raise ValueError(f"frames: got {given.dtype} {tuple(given.shape)}, want floats [B, T, 3, H, W]")
    if len(inputs.prompts) != len(given):
        raise ValueError(f"prompts: got {len(inputs.prompts)}, want {len(given)}, one per sample")
    indices = sampled_indices(frames, given.shape[1])
    pixels = torch.empty(len(given), len(indices), *given.shape[2:], dtype=torch.uint8, device=given.device)
    # a sample at a time: the copies in float32 would be several times a batch of videos
    for target, sample in zip(pixels, given, strict=True):
        chosen = sample[indices].float()
        if not bool(((chosen >= 0) & (chosen <= 1)).all()):
            low, high = chosen.aminmax()
            raise ValueError(f"frames: got values from {low.item():g} to {high.item():g}, want [0, 1]")
        target.copy_(chosen.mul_(255).round_())
    return pixels
