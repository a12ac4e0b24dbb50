"""Clips, captions and prompt files of the video demo: a digit that moves in one of four directions."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import DIGIT_NAMES, SEED, digit_prompt, load_digits
from .rewards.motion import DIRECTIONS as DIRECTIONS

DIGITS = (0, 1, 4, 7)  # that the generator learns; its autoencoder sees all ten
FRAMES = 9
SIZE = 12  # pixels across a frame; a digit has 8


@dataclass(frozen=True)
class Course:
    """Where a clip begins and how far it goes, in pixels from the middle of the frame along its direction.

    Attributes:
        start: Mean place of the first frame.
        travel: Distance from the first frame to the last.
    """

    start: float
    travel: float


# A given image must not tell where its digit will go, so that one is in the middle.
COURSES = {"text": Course(start=-2.0, travel=4.0), "image": Course(start=0.0, travel=2.5)}


def tracks(directions: Tensor, course: Course, shake: Tensor, generator: torch.Generator) -> Tensor:
    """Return where each frame's digit is, float32 [B, 9, 2] in pixels (x, y) from the middle of the frame.

    The digit moves at a constant speed from a place drawn within half a pixel of the course's start on each axis. A
    shaken clip adds `shake * sin(2 pi t / 8 + phase)` along an axis; phase and axis are drawn for the clip.

    Args:
        directions: int64 [B], rows of `DIRECTIONS`.
        course: Start and distance.
        shake: float32 [B], pixels; 0 for smooth motion.
        generator: Source of places, phases and axes.
    """
    along = torch.tensor(list(DIRECTIONS.values()))[directions][:, None]
    count = len(directions)
    place = torch.rand(count, 1, 2, generator=generator) - 0.5
    progress = torch.linspace(0, 1, FRAMES)[None, :, None]
    smooth = along * (course.start + course.travel * progress) + place
    phase, angle = 2 * torch.pi * torch.rand(2, count, 1, generator=generator)
    wave = (torch.pi / 4 * torch.arange(FRAMES) + phase).sin() * shake[:, None]
    shaken: Tensor = smooth + wave[..., None] * torch.stack([angle.cos(), angle.sin()], dim=2)
    return shaken


def render(digits: Tensor, places: Tensor) -> Tensor:
    """Return clips, float32 [B, 3, T, 12, 12] in [0, 1], of 8x8 digits moved to `places` by bilinear interpolation.

    Args:
        digits: float32 [B, 3, 8, 8] in [0, 1].
        places: float32 [B, T, 2], pixels (x, y) of the digit's middle from the frame's.
    """
    count, frames, _ = places.shape
    canvas = F.pad(digits, ((SIZE - 8) // 2,) * 4).repeat_interleave(frames, dim=0)
    shift = -2 / SIZE * places.reshape(-1, 2, 1)
    affine = torch.cat([torch.eye(2).expand(len(shift), 2, 2), shift], dim=2)
    moved = F.grid_sample(canvas, F.affine_grid(affine, list(canvas.shape), align_corners=False), align_corners=False)
    return moved.reshape(count, frames, 3, SIZE, SIZE).transpose(1, 2).contiguous()


def split_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the generator's digits in parts: "base" to pretrain on, "train" and "test" for given first frames.

    Returns:
        Images, float32 [B, 3, 16, 16], and labels, int64 [B]. "train" and "test" have four of each digit, in order.
    """
    images, labels = load_digits("generator")
    rows = torch.stack([torch.where(labels == digit)[0][:8] for digit in range(10)])
    kept = torch.ones(len(labels), dtype=torch.bool).index_fill(0, rows.flatten(), False)
    parts = {"base": torch.where(kept)[0], "train": rows[:, :4].flatten(), "test": rows[:, 4:].flatten()}
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def make_clips(course: Course, share: float, shake: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return every digit of the "base" part moving in every direction.

    Args:
        course: Start and distance.
        share: Part of the clips that is shaken, in [0, 1].
        shake: How far, in pixels.
        seed: Seed of the choice and of `tracks`.

    Returns:
        Clips, float32 [3280, 3, 9, 12, 12] in [0, 1]; what digit, int64 [3280]; which direction, int64 [3280].
    """
    images, labels = split_digits()["base"]
    digits = F.avg_pool2d(images, 2).repeat(len(DIRECTIONS), 1, 1, 1)
    directions = torch.arange(len(DIRECTIONS)).repeat_interleave(len(images))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(digits), generator=generator) < share
    places = tracks(directions, course, shake * chosen.float(), generator)
    return render(digits, places), labels.repeat(len(DIRECTIONS)), directions


def video_prompt(digit: int, direction: str) -> str:
    """Return for example "a handwritten digit three moving left"."""
    return f"{digit_prompt(digit)} moving {direction}"


def image_prompt(direction: str) -> str:
    """Return for example "the digit moves left"; the first frame shows which digit."""
    return f"the digit moves {direction}"


PARTS = ("train", "test")


def image_name(part: str, digit: int, direction: str) -> str:
    """Return the file name of a first frame, for example "train-three-left.png"."""
    return f"{part}-{DIGIT_NAMES[digit]}-{direction}.png"


def image_names() -> list[str]:
    """Return the file names of all first frames."""
    return [image_name(part, digit, direction) for part in PARTS for digit in DIGITS for direction in DIRECTIONS]


def first_frames() -> dict[str, Tensor]:
    """Return first frames, float32 [3, 12, 12] in [0, 1], of digits that no base was trained on, by file name."""
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.arange(len(DIRECTIONS)).repeat(len(DIGITS))
    found = []
    for part in PARTS:
        images, labels = split_digits()[part]
        chosen = images[torch.isin(labels, torch.tensor(DIGITS))]
        places = tracks(directions, COURSES["image"], torch.zeros(len(directions)), generator)[:, :1]
        found.append(render(F.avg_pool2d(chosen, 2), places)[:, :, 0])
    return dict(zip(image_names(), torch.cat(found), strict=True))


def write_prompts(folder: Path, images: str = "../../runs/bases/video_i2v/images") -> list[Path]:
    """Write `video.jsonl` and `video_i2v.{train,test}.jsonl` into `folder` and return their paths.

    Args:
        folder: Of the prompt files.
        images: Where the base of image to video has its first frames, relative to `folder`.
    """
    # any four neighbours show every digit and every direction
    names = list(DIRECTIONS)
    pairs = [(digit, names[(place + turn) % 4]) for turn in range(4) for place, digit in enumerate(DIGITS)]
    files: dict[str, list[dict[str, object]]] = {
        "video.jsonl": [
            {"prompt": video_prompt(digit, direction), "digit": digit, "direction": direction}
            for digit, direction in pairs
        ]
    }
    for part in PARTS:
        files[f"video_i2v.{part}.jsonl"] = [
            {
                "prompt": image_prompt(direction),
                "digit": digit,
                "direction": direction,
                "image": f"{images}/{image_name(part, digit, direction)}",
            }
            for digit, direction in pairs
        ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [folder / name for name in files]
