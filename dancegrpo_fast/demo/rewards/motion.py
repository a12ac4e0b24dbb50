"""Rewards for clips of one moving digit: does it go where the prompt says, smoothly, and is it still that digit?

All start from the track c_t of the digit, the centre of mass of each frame's ink. Ink is the brightness above a tenth,
`max(0, mean of the three channels - 1/10)`; coordinates are pixels, x to the right and y down. A frame is blank if its
ink adds up to less than one pixel; it has no centre of mass. A clip with a blank frame shows no motion that could be
judged, and gets the least score of the formula: that is a part of its definition and not a default.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...rewards.base import RewardInput
from .digits import Reader, WantsDigit, load_net

# x to the right, y down
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
PAPER = 0.1  # brightness up to which a pixel holds no ink
BLANK = 1.0  # ink of a frame, in bright pixels, below which it has no centre of mass


def centres(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre of mass of each frame's ink and which frames are not blank.

    Args:
        frames: float32 [B, T, 3, H, W] in [0, 1].

    Returns:
        Centres in pixels (x, y) from the middle of the top left pixel, float64 [B, T, 2], nan where a frame is blank,
        and bool [B, T].

    Raises:
        ValueError: frames are not [B, T, 3, H, W] with at least one frame.
    """
    if frames.ndim != 5 or frames.shape[2] != 3 or 0 in frames.shape[1:]:
        raise ValueError(f"frames: got shape {tuple(frames.shape)}, want [B, T, 3, H, W]")
    ink = (frames.double().mean(dim=2) - PAPER).clamp(min=0)
    mass = ink.sum(dim=(2, 3))
    x = (ink.sum(dim=2) * torch.arange(ink.shape[3], device=ink.device)).sum(dim=2)
    y = (ink.sum(dim=3) * torch.arange(ink.shape[2], device=ink.device)).sum(dim=2)
    seen = mass >= BLANK
    return torch.where(seen[..., None], torch.stack([x, y], dim=2) / mass[..., None], torch.nan), seen


def acceleration(track: Tensor) -> Tensor:
    """Return the mean length of c_{t+1} - 2 c_t + c_{t-1} over t, pixels per frame squared: [B, T, 2] to [B]."""
    second = track[:, 2:] - 2 * track[:, 1:-1] + track[:, :-2]
    mean: Tensor = second.norm(dim=2).mean(dim=1)
    return mean


class MotionAlignment:
    """How far the digit goes in the direction that the prompt wants: (c_T - c_1) . d / travel, cut to [-1, 1].

    Standing still scores 0 and the wrong way less. A clip with a blank frame scores -1. `meta["direction"]` is one of
    left, right, up and down.

    Args:
        travel: Pixels from the first frame to the last of a clip that scores 1.

    Raises:
        ValueError: `travel` is not positive.
    """

    def __init__(self, travel: float) -> None:
        if not travel > 0:
            raise ValueError(f"travel: got {travel}, want more than 0 pixels")
        self.travel = travel

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a row of `meta` without a direction."""
        for row, columns in enumerate(meta):
            direction = columns.get("direction")
            if direction not in DIRECTIONS:
                raise ValueError(f'meta[{row}]["direction"]: got {direction!r}, want one of {", ".join(DIRECTIONS)}')

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return scores in [-1, 1], float32 [B].

        Raises:
            ValueError: there is one frame, or a row of `meta` has no direction.
        """
        track, seen = centres(_clips(inputs, 2))
        self.check(inputs.prompts, inputs.meta)
        wanted = [DIRECTIONS[columns["direction"]] for columns in inputs.meta]
        directions = torch.tensor(wanted, dtype=track.dtype, device=track.device).reshape(-1, 2)
        share = ((track[:, -1] - track[:, 0]) * directions).sum(dim=1) / self.travel
        return torch.where(seen.all(dim=1), share.clamp(-1, 1), -1.0).float()


class MotionQuality:
    """Smoothness: exp(-2 a), a the mean length of c_{t+1} - 2 c_t + c_{t-1} in pixels per frame squared.

    1 is motion at a constant velocity, which standing still is too. A clip with a blank frame scores 0.
    """

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return scores in [0, 1], float32 [B].

        Raises:
            ValueError: there are fewer than three frames.
        """
        track, seen = centres(_clips(inputs, 3))
        return torch.where(seen.all(dim=1), (-2 * acceleration(track)).exp(), 0.0).float()


class MovingDigit(WantsDigit):
    """Probability of the wanted digit under the CNN saved with a demo base, averaged over the frames.

    Each frame is looked at through a window of 8x8 pixels around its centre of mass, which a blank frame does not have:
    it counts 0 in the average.

    Args:
        path: A `digit_cnn.safetensors` file.

    Raises:
        ValueError: `path` is not a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.net = load_net(path)

    @torch.no_grad()
    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return scores in [0, 1], float32 [B].

        Raises:
            ValueError: frames are not [B, T, 3, H, W], or a row of `meta` has no digit in 0..9.
        """
        digits = self.wanted(inputs)
        images, seen = windows(_clips(inputs, 1).float().cpu())
        probabilities: Tensor = self.net(images.flatten(0, 1)).softmax(dim=1).view(*seen.shape, 10)
        wanted = probabilities[torch.arange(len(digits)), :, digits]
        return (wanted * seen).mean(dim=1)


class MovingDigitJudge(WantsDigit):
    """Share of the frames in which an RBF SVM reads the wanted digit, through the same window; 0 in a blank frame.

    The SVM is trained at construction on the judge split alone, seen through the window too.
    """

    def __init__(self) -> None:
        from ..data import load_digits

        images, labels = load_digits("judge")
        canvas = F.pad(F.avg_pool2d(images, 2), (4, 4, 4, 4))
        self.read = Reader(windows(canvas[:, None])[0].flatten(0, 1), labels)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return scores in [0, 1], float32 [B].

        Raises:
            ValueError: frames are not [B, T, 3, H, W], or a row of `meta` has no digit in 0..9.
        """
        digits = self.wanted(inputs)
        images, seen = windows(_clips(inputs, 1).float().cpu())
        read = self.read(images.flatten(0, 1)).view(seen.shape)
        return ((read == digits[:, None]) & seen).float().mean(dim=1)


class FirstFrame:
    """How much of the given image the first frame keeps: 1 - sum |frame - image| / sum image, over pixels and channels.

    `meta["image"]` is the path of the image, of the frames' size; 1 is the same frame, 0 is as far off as a black one.
    """

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a row of `meta` without the path of a file."""
        for row, columns in enumerate(meta):
            path = columns.get("image")
            if not isinstance(path, str) or not Path(path).is_file():
                raise ValueError(f'meta[{row}]["image"]: got {path!r}, want the path of an image')

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return scores of at most 1, float32 [B].

        Raises:
            ValueError: a row of `meta` has no image, or one that is black or of another size.
        """
        from PIL import Image

        frames = _clips(inputs, 1)[:, 0].double().cpu()
        self.check(inputs.prompts, inputs.meta)
        scores = []
        for row, (frame, columns) in enumerate(zip(frames, inputs.meta, strict=True)):
            with Image.open(columns["image"]) as file:
                channels = [torch.tensor(list(band.get_flattened_data())) for band in file.convert("RGB").split()]
                image = torch.stack(channels).double().div(255).reshape(3, file.height, file.width)
            if image.shape != frame.shape or not bool(image.any()):
                raise ValueError(
                    f'meta[{row}]["image"]: got {tuple(image.shape)}, want {tuple(frame.shape)} and not all black'
                )
            scores.append(1 - (frame - image).abs().sum() / image.sum())
        return torch.stack(scores).float() if scores else torch.empty(0)


def windows(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is around the centre of mass of each frame, at twice the size, and which frames are not blank.

    Args:
        frames: float32 [B, T, 3, H, W] in [0, 1].

    Returns:
        The 8x8 pixels around each centre, bilinear, then bicubic to 16x16 as `demo.data.load_digits` does it, float32
        [B, T, 3, 16, 16] in [0, 1]; zeros where a frame is blank; and bool [B, T].
    """
    track, seen = centres(frames)
    count, length, _, height, width = frames.shape
    places = torch.arange(8, dtype=torch.float32, device=frames.device) - 3.5
    middle = track.nan_to_num().float().reshape(-1, 2)
    x = (2 * (middle[:, :1] + places) + 1) / width - 1
    y = (2 * (middle[:, 1:] + places) + 1) / height - 1
    grid = torch.stack([x[:, None, :].expand(-1, 8, 8), y[:, :, None].expand(-1, 8, 8)], dim=3)
    native = F.grid_sample(frames.flatten(0, 1), grid, align_corners=False)
    large = F.interpolate(native, (16, 16), mode="bicubic", align_corners=False).clamp(0, 1)
    return large.view(count, length, 3, 16, 16) * seen[..., None, None, None], seen


def _clips(inputs: RewardInput, at_least: int) -> Tensor:
    frames = inputs.frames
    if frames.ndim != 5 or frames.shape[1] < at_least:
        raise ValueError(f"frames: got shape {tuple(frames.shape)}, want [B, T, 3, H, W] with T at least {at_least}")
    if len(inputs.meta) != len(frames):
        raise ValueError(f"meta: got {len(inputs.meta)} rows, want {len(frames)}, one per sample")
    return frames
