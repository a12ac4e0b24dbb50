"""What CLIP sees of an image: Pillow's bicubic resize and HPS's letterbox, on tensors of any device."""

from functools import lru_cache
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BITS = 22  # of the fixed-point weights, as in Pillow's Resample.c
_SUPPORT = 2.0  # of the bicubic kernel, in source pixels


@lru_cache(maxsize=64)
def _weights(source: int, target: int, first: int, count: int) -> Tensor:
    """Rows `first` to `first + count` of the fixed-point weights [target, source], integers in float64."""
    scale = source / target
    stretch = max(scale, 1.0)
    reach = _SUPPORT * stretch
    matrix = np.zeros((count, source))
    for row in range(count):
        center = (first + row + 0.5) * scale
        low, high = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), source)
        x = np.abs((np.arange(low, high) - center + 0.5) * (1.0 / stretch))
        near = (1.5 * x - 2.5) * x * x + 1  # the cubic convolution kernel with a = -0.5
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        taps = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        # cumsum adds one by one like Pillow; sum would add in pairs
        taps = taps / taps.cumsum()[-1] * (1 << _BITS)
        matrix[row, low:high] = np.trunc(taps + np.copysign(0.5, taps))
    return torch.from_numpy(matrix)


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Resize as `PIL.Image.resize(..., BICUBIC)` does, to the bit.

    Two passes, horizontal first, with weights of 22 fractional bits; each rounds and clips to 8 bits. The products
    are exact in float64, so that the result depends neither on the device nor on the order of the sums. Pillow 13
    goes vertically first where the height loses more than twice what the width loses, so it differs there from
    every Pillow before it and from this: with a kept aspect ratio, for images shrunk that are over twice as high as
    wide.

    Args:
        images: uint8 [..., H, W].
        height: of the result.
        width: of the result.

    Returns:
        uint8 [..., height, width].

    Raises:
        ValueError: `images` is not uint8, or a size is less than 1.
    """
    if images.dtype != torch.uint8 or images.ndim < 2 or 0 in images.shape[-2:]:
        raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, want uint8 [..., H, W]")
    if height < 1 or width < 1:
        raise ValueError(f"size: got {height} x {width}, want at least 1 x 1")
    return _resized_part(images, (height, width), (0, 0), (height, width))


def _resized_part(images: Tensor, whole: tuple[int, int], first: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The part of `size` from row and column `first` of the images resized to `whole`; nothing else is computed."""
    (height, width), (top, left), (rows, columns) = whole, first, size
    result = images
    if width != images.shape[-1]:
        result = _fixed_point(result.double() @ _weights(images.shape[-1], width, left, columns).to(images.device).T)
    else:
        result = result[..., left : left + columns]
    if height != images.shape[-2]:
        return _fixed_point(_weights(images.shape[-2], height, top, rows).to(images.device) @ result.double())
    return result[..., top : top + rows, :]


def _fixed_point(sums: Tensor) -> Tensor:
    rounded = sums.add_(1 << (_BITS - 1)).div_(1 << _BITS).floor_()
    return rounded.clamp_(0, 255).to(torch.uint8)


def resize_and_crop(images: Tensor, size: int, *, even: bool = False) -> Tensor:
    """Scale the shorter side to `size` as `resize_bicubic` does and cut a centred square, uint8 [..., size, size].

    The longer side becomes `int(size * long / short)`. Half of an odd margin is rounded down, as in transformers'
    CLIPImageProcessor with Pillow; `even` rounds it to the even neighbour, as torchvision's crop does.
    """
    height, width = images.shape[-2:]
    if width <= height:
        height, width = int(size * height / width), size
    else:
        height, width = size, int(size * width / height)
    top, left = (round((side - size) / 2) if even else (side - size) // 2 for side in (height, width))
    return _resized_part(images, (height, width), (top, left), (size, size))


def normalise(images: Tensor) -> Tensor:
    """Return `(images - mean) / std` with CLIP's constants, float32 [..., 3, H, W] in and out."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Return uint8 [..., 3, H, W] as CLIP's image processor prepares it, float32 [..., 3, size, size], to the bit."""
    # the processor multiplies by 1 / 255 in float64 where torchvision divides
    return normalise((resize_and_crop(images, size).double() * (1 / 255)).float())


def openai_pixels(images: Tensor, size: int) -> Tensor:
    """Return uint8 [..., 3, H, W] as OpenAI's CLIP prepares it with torchvision, float32 [..., 3, size, size]."""
    return normalise(resize_and_crop(images, size, even=True).float() / 255)


def letterbox_pixels(images: Tensor, size: int) -> Tensor:
    """Return uint8 [B, 3, H, W] as HPS-v2 prepares it, float32 [B, 3, size, size].

    The longer side is scaled to `size` in float32 with antialiased bicubic weights and is not clipped; black bars fill
    the rest, an odd row or column at the end. An image whose longer side is `size` already gets bars too (HPS's own
    code leaves it as it is, which its model then refuses).
    """
    height, width = images.shape[-2:]
    pixels = images.float() / 255
    scale = size / max(height, width)
    if scale != 1.0:
        height, width = (round(side * scale) for side in (height, width))
        if min(height, width) < 1:
            raise ValueError(f"frames: got {tuple(images.shape[-2:])}, which is less than 1 pixel of {size} across")
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    down, right = size - height, size - width
    padded = F.pad(pixels, (right // 2, ceil(right / 2), down // 2, ceil(down / 2)))
    return normalise(padded)
