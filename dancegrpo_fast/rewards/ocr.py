"""Rewards that read the text in an image with the recogniser of PP-OCR, without text detection."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import RewardInput

_LINE_HEIGHT = 48  # what the recogniser scales every line to


class OcrReader:
    """Read each image as one line of text.

    Args:
        invert: Turn bright ink on a dark ground into dark on light, which the recogniser reads best.
        upscale: Integer factor of a bicubic enlargement, at least 1.
        margin: Pixels of white ground added on every side, after inversion, before the enlargement; at least 0.
        threads: Threads of onnxruntime.

    Raises:
        ValueError: `upscale`, `margin` or `threads` is out of range.
    """

    def __init__(self, invert: bool = False, upscale: int = 1, margin: int = 0, threads: int = 2) -> None:
        for name, value, least in (("upscale", upscale, 1), ("margin", margin, 0), ("threads", threads, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, want at least {least}")
        from rapidocr import RapidOCR

        self.invert, self.upscale, self.margin = invert, upscale, margin
        self._engine: Any = RapidOCR(
            params={
                "Global.use_det": False,
                "Global.use_cls": False,
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                # lines keep their own width: padding to 320 pixels would cost four times the time
                "Rec.rec_img_shape": [3, _LINE_HEIGHT, _LINE_HEIGHT],
                "Rec.rec_batch_num": 32,
            }
        )

    def __call__(self, images: Tensor) -> list[str]:
        """Return the text in each of `images`, float32 [N, 3, H, W] in [0, 1]; "" where nothing is read."""
        if not len(images):
            return []
        pixels = images.float().cpu()
        if self.invert:
            pixels = 1 - pixels
        if self.margin:
            pixels = F.pad(pixels, (self.margin,) * 4, value=1.0)
        if self.upscale > 1:
            pixels = F.interpolate(pixels, scale_factor=self.upscale, mode="bicubic", align_corners=False)
        # the recogniser expects the BGR order of OpenCV
        rows = (pixels.flip(1).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return [str(text) for text in self._engine.recognize_txt(list(rows)).txts]


class OcrReward:
    """1 - min(edit distance, length) / length between the quoted text of the prompt and what the image reads.

    Case and spaces do not count. The arguments are those of `OcrReader`.
    """

    def __init__(self, invert: bool = False, upscale: int = 1, margin: int = 0, threads: int = 2) -> None:
        self.reader = OcrReader(invert, upscale, margin, threads)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return scores in [0, 1], float32 [N].

        Raises:
            ValueError: frames are not [N, 1, 3, H, W], or a prompt has no text in double quotes.
        """
        wanted, read = _wanted_and_read(self.reader, inputs)
        scores = [1 - min(edit_distance(w, r), len(w)) / len(w) for w, r in zip(wanted, read, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


class OcrExact:
    """1.0 where the image reads exactly the quoted text of the prompt, else 0.0.

    Case and spaces do not count. The arguments are those of `OcrReader`.
    """

    def __init__(self, invert: bool = False, upscale: int = 1, margin: int = 0, threads: int = 2) -> None:
        self.reader = OcrReader(invert, upscale, margin, threads)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return 0.0 or 1.0 a sample, float32 [N].

        Raises:
            ValueError: frames are not [N, 1, 3, H, W], or a prompt has no text in double quotes.
        """
        wanted, read = _wanted_and_read(self.reader, inputs)
        return torch.tensor([float(w == r) for w, r in zip(wanted, read, strict=True)], dtype=torch.float32)


def quoted_text(prompt: str) -> str:
    """Return the text in double quotes of a prompt, in lower case and without spaces.

    Raises:
        ValueError: `prompt` has no such text, or more than one.
    """
    found = re.findall(r'"([^"]*)"', prompt)
    text = _plain(found[0]) if len(found) == 1 else ""
    if not text:
        raise ValueError(f"prompts: got {prompt!r}, want exactly one text in double quotes")
    return text


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the least number of insertions, deletions and replacements that turn `one` into `other`."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _wanted_and_read(reader: OcrReader, inputs: RewardInput) -> tuple[list[str], list[str]]:
    shape = tuple(inputs.frames.shape)
    if len(shape) != 5 or shape[1:3] != (1, 3):
        raise ValueError(f"frames: got shape {shape}, want [N, 1, 3, H, W]")
    if len(inputs.prompts) != shape[0]:
        raise ValueError(f"prompts: got {len(inputs.prompts)}, want {shape[0]}, one per sample")
    wanted = [quoted_text(prompt) for prompt in inputs.prompts]
    return wanted, [_plain(text) for text in reader(inputs.frames[:, 0])]
