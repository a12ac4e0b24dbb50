"""Which frames of a video VideoReward sees, at which size, and as which patches."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .pixels import normalise

_LEAST_FRAMES, _MOST_FRAMES = 4, 768
_LEAST_PIXELS = 128 * 28 * 28  # of a frame: smaller ones are enlarged


def frame_indices(length: int, fps: float, rate: float) -> list[int]:
    """Return the frames that stand for a video of `length` frames, an even number of them.

    `linspace(0, length - 1, n)` rounded, n = `length / fps * rate` within 4 and 768, at most `length`, rounded to even
    (sampling of Qwen2-VL with its first and last frame included).

    Raises:
        ValueError: `length` is less than 2, or `fps` is not positive.
    """
    if length < 2:
        raise ValueError(f"frames: got {length} per sample, want a video of at least 2")
    if not fps > 0:
        raise ValueError(f"fps: got {fps}, want more than 0")
    most = min(_MOST_FRAMES, length) // 2 * 2
    count = 2 * round(min(max(length / fps * rate, _LEAST_FRAMES), most) / 2)
    return [int(i) for i in torch.linspace(0, length - 1, count).round()]


def frame_size(height: int, width: int, factor: int, most_pixels: int) -> tuple[int, int]:
    """Return the size of a frame for the model: multiples of `factor` near the aspect ratio.

    Rounded to `factor`; where that is more than `most_pixels` or less than 100,352 pixels, scaled to that bound and
    rounded inwards (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > most_pixels:
        scale = math.sqrt(height * width / most_pixels)
        rows, columns = (math.floor(side / scale / factor) * factor for side in (height, width))
    elif rows * columns < _LEAST_PIXELS:
        scale = math.sqrt(_LEAST_PIXELS / (height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    if not rows * columns:
        raise ValueError(f"frames: got {height} x {width}, too long a strip for {most_pixels} pixels")
    return rows, columns


def patches(
    frames: Tensor, size: tuple[int, int], patch: int, merge: int, duration: int
) -> tuple[Tensor, tuple[int, int, int]]:
    """Resize, normalise and cut frames into the patches of Qwen2-VL's vision model.

    The resize is torchvision's on bytes (antialiased bicubic in float32, then rounded to 8 bits). Patches of one merged
    token are neighbours; within a patch the order is channel, frame, row, column.

    Args:
        frames: uint8 [B, T, 3, H, W], T a multiple of `duration`.
        size: of the frames for the model, multiples of `patch * merge`.
        patch: pixels of a patch across.
        merge: patches of a token across.
        duration: frames of a patch.

    Returns:
        float32 [B t h w, 3 duration patch patch], and (t, h, w) in patches.
    """
    n, length = frames.shape[:2]
    flat = frames.flatten(0, 1).float()
    if size != tuple(frames.shape[-2:]):
        flat = F.interpolate(flat, size=size, mode="bicubic", antialias=True).clamp(0, 255).round()
    t, h, w = length // duration, size[0] // patch, size[1] // patch
    cut = normalise(flat / 255).view(n, t, duration, 3, h // merge, merge, patch, w // merge, merge, patch)
    ordered = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return ordered.reshape(n * t * h * w, 3 * duration * patch * patch), (t, h, w)
