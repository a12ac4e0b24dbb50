"""Preparation of images on tensors against Pillow and transformers' own processor."""

import numpy as np
import pytest
import torch
from PIL import Image

from dancegrpo_fast.rewards import pixels as pixels_module
from dancegrpo_fast.rewards.pixels import CLIP_MEAN, CLIP_STD, clip_pixels, letterbox_pixels, resize_bicubic

from ..tolerances import assert_same_resize
from .tiny_clip import pillow_processor

SIZES = [
    ((37, 45), (28, 34)),
    ((37, 45), (112, 17)),
    ((1, 1), (5, 3)),
    ((2, 9), (1, 1)),
    ((61, 3), (60, 59)),
    ((64, 64), (64, 31)),
    ((64, 64), (31, 64)),
    ((300, 211), (13, 14)),
]
PICTURES = ["noise", "black and white"]  # the second one overshoots, so that both passes clip


def picture(kind: str, height: int, width: int) -> torch.Tensor:
    pixels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(height * 997 + width))
    return (pixels if kind == "noise" else (pixels > 127) * 255).to(torch.uint8)


def with_pillow(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Horizontally, then vertically: newer Pillows choose the order of one call themselves."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image = image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
def test_bicubic_is_pillows_to_the_bit(source: tuple[int, int], target: tuple[int, int], kind: str) -> None:
    pixels = picture(kind, *source)
    found = resize_bicubic(pixels, *target)
    assert found.dtype == torch.uint8
    assert torch.equal(found, with_pillow(pixels, *target))


def test_bicubic_at_random_sizes() -> None:
    sizes = torch.randint(1, 70, (60, 4), generator=torch.Generator().manual_seed(0)).tolist()
    for height, width, *target in sizes:
        pixels = picture("noise", height, width)
        assert torch.equal(resize_bicubic(pixels, *target), with_pillow(pixels, *target)), (height, width, target)


@pytest.mark.parametrize("size", [28, 33, 224])
@pytest.mark.parametrize("source", [(37, 45), (45, 38), (224, 224), (29, 57), (57, 29), (20, 90), (300, 301)], ids=str)
def test_clip_pixels_are_the_processors_to_the_bit(source: tuple[int, int], size: int) -> None:
    pixels = picture("noise", *source)
    processor = pillow_processor(size)
    wanted = processor(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))["pixel_values"][0]
    found = clip_pixels(pixels, size)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(np.asarray(wanted)))


def test_a_strip_is_only_enlarged_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """2000 rows of 3 pixels would be 18,666 rows of 28, of which 28 are kept."""
    made: list[int] = []
    original = pixels_module._fixed_point
    monkeypatch.setattr(pixels_module, "_fixed_point", lambda sums: made.append(sums.shape[1]) or original(sums))
    pixels = picture("noise", 2000, 3)
    found = pixels_module.resize_and_crop(pixels, 28)
    assert torch.equal(found, with_pillow(pixels, 18666, 28)[:, 9319:9347])
    assert made == [2000, 28]


@pytest.mark.parametrize("prepare", [clip_pixels, letterbox_pixels])
@pytest.mark.parametrize("source", [(37, 45), (28, 21), (90, 11)], ids=str)
def test_a_batch_is_its_images(prepare, source: tuple[int, int]) -> None:
    pixels = torch.stack([picture(kind, *source) for kind in (*PICTURES, "noise")])
    assert torch.equal(prepare(pixels, 28), torch.cat([prepare(one[None], 28) for one in pixels]))


@pytest.mark.parametrize("source", [(37, 45), (45, 37), (60, 60), (28, 28), (11, 90), (10, 4)], ids=str)
def test_letterbox(source: tuple[int, int]) -> None:
    """Pillow resizes the floats of one channel in float64 sums, and clips nothing either."""
    size = 28
    pixels = picture("black and white", *source)
    scale = size / max(source)
    height, width = (round(side * scale) for side in source)
    top, left = (size - height) // 2, (size - width) // 2
    wanted = torch.zeros(3, size, size, dtype=torch.float64)
    for channel, values in zip(wanted, pixels.float() / 255, strict=True):
        resized = Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        channel[top : top + height, left : left + width] = torch.from_numpy(np.array(resized))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    assert_same_resize(letterbox_pixels(pixels[None], size)[0], (wanted - mean) / std)
    assert source != (10, 4) or float(wanted.max()) > 1  # an enlargement overshoots, and nothing was clipped


def test_black_bars_where_the_longer_side_fits_already() -> None:
    pixels = picture("noise", 28, 20)
    found = letterbox_pixels(pixels[None], 28)[0]
    black = letterbox_pixels(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), 28)[0]
    assert torch.equal(found[:, :, :4], black[:, :, :4])
    assert torch.equal(found[:, :, 24:], black[:, :, 24:])
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    assert torch.equal(found[:, :, 4:24], (pixels.float() / 255 - mean) / std)


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (torch.zeros(3, 4, 4), (2, 2), "images: got torch.float32"),
        (torch.zeros(4, dtype=torch.uint8), (2, 2), "images: got"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), (2, 2), "images: got"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), (0, 2), "size: got 0 x 2"),
    ],
)
def test_bad_input(images: torch.Tensor, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_bicubic(images, *size)
    with pytest.raises(ValueError, match="frames: got"):
        letterbox_pixels(torch.zeros(1, 3, 1, 100, dtype=torch.uint8), 28)
