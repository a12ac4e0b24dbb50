"""Rewards that read the text in images and videos with PP-OCR, whose weights come with the rapidocr package."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import RewardInput
from .frames import Sampling, check_sampling, sampled_bytes

_LINE_HEIGHT = 48  # what the recogniser scales every line to
_AT_A_TIME = 32  # images, and lines in one call of the recogniser


class OcrReader:
    """Find the lines of text in each image and read them as rapidocr does, or take each image for one line.

    Found lines are turned upright, and joined by spaces in rapidocr's reading order: by their top edges, and from the
    left where these are less than 10 pixels apart. Lines read with a confidence below 0.5 are left out.

    Args:
        invert: Turn bright ink on a dark ground into dark on light, which the recogniser reads best.
        upscale: Integer factor of a bicubic enlargement, at least 1.
        margin: Pixels of white ground added on every side, after inversion, before the enlargement; at least 0.
        threads: Threads of onnxruntime.
        detect: Find the lines. False takes an image for one upright line that fills it, which is many times faster.

    Raises:
        ValueError: `upscale`, `margin` or `threads` is out of range.
    """

    def __init__(
        self, invert: bool = False, upscale: int = 1, margin: int = 0, threads: int = 2, detect: bool = True
    ) -> None:
        for name, value, least in (("upscale", upscale, 1), ("margin", margin, 0), ("threads", threads, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, want at least {least}")
        from rapidocr import RapidOCR

        self.invert, self.upscale, self.margin, self.detect = invert, upscale, margin, detect
        self._engine: Any = RapidOCR(
            params={
                "Global.use_det": detect,
                "Global.use_cls": detect,
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                # lines keep their own width: padding to 320 pixels would cost four times the time
                "Rec.rec_img_shape": [3, _LINE_HEIGHT, _LINE_HEIGHT],
                "Rec.rec_batch_num": _AT_A_TIME,
            }
        )

    def __call__(self, images: Tensor) -> list[str]:
        """Return the text in each of `images`, uint8 [B, 3, H, W] or floats in [0, 1]; "" where nothing is read."""
        return [text for part in images.split(_AT_A_TIME) if len(part) for text in self._read(part)]

    def _read(self, images: Tensor) -> list[str]:
        pixels = images.float().cpu()
        if images.dtype == torch.uint8:
            pixels = pixels / 255
        if self.invert:
            pixels = 1 - pixels
        if self.margin:
            pixels = F.pad(pixels, (self.margin,) * 4, value=1.0)
        if self.upscale > 1:
            pixels = F.interpolate(pixels, scale_factor=self.upscale, mode="bicubic", align_corners=False)
        # the recogniser expects the BGR order of OpenCV
        rows = (pixels.flip(1).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        if self.detect:
            return [" ".join(self._engine(row).txts or ()) for row in rows]
        return [str(text) for text in self._engine.recognize_txt(list(rows)).txts]


class _Ocr:
    def __init__(
        self,
        invert: bool = False,
        upscale: int = 1,
        margin: int = 0,
        threads: int = 2,
        detect: bool = True,
        frames: Sampling = "all",
    ) -> None:
        self.frames = check_sampling(frames)
        self.reader = OcrReader(invert, upscale, margin, threads, detect)

    def check(self, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a prompt without exactly one text in double quotes."""
        for prompt in prompts:
            quoted_text(prompt)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return scores in [0, 1], float32 [B]; of a video, the mean over its sampled frames.

        Raises:
            ValueError: frames are not floats [B, T, 3, H, W] in [0, 1], are too few, or prompts are not B; or a prompt
                has no text in double quotes.
        """
        pixels = sampled_bytes(inputs, self.frames)
        count = pixels.shape[1]
        wanted = [quoted_text(prompt) for prompt in inputs.prompts for _ in range(count)]
        read = [_plain(text) for text in self.reader(pixels.flatten(0, 1))]
        scores = [self._score(one, other) for one, other in zip(wanted, read, strict=True)]
        return torch.tensor(scores, dtype=torch.float32).view(len(pixels), count).mean(dim=1)

    def _score(self, wanted: str, read: str) -> float:
        raise NotImplementedError


class OcrReward(_Ocr):
    """1 - min(edit distance, length) / length between the quoted text of the prompt and what the image reads.

    Case and spaces do not count; whatever else is read does, but with `contains`.

    Args:
        invert, upscale, margin, threads, detect: as for `OcrReader`.
        frames: which frames of a video are read, "first", "middle", "all" or a count, evenly spaced.
        contains: any reading that contains the quoted text scores 1, as in Flow-GRPO (arXiv 2505.05470).
    """

    def __init__(
        self,
        invert: bool = False,
        upscale: int = 1,
        margin: int = 0,
        threads: int = 2,
        detect: bool = True,
        frames: Sampling = "all",
        contains: bool = False,
    ) -> None:
        super().__init__(invert, upscale, margin, threads, detect, frames)
        self.contains = contains

    def _score(self, wanted: str, read: str) -> float:
        if self.contains and wanted in read:
            return 1.0
        return 1 - min(edit_distance(wanted, read), len(wanted)) / len(wanted)


class OcrExact(_Ocr):
    """1.0 where the image reads exactly the quoted text of the prompt, else 0.0.

    Case and spaces do not count. The arguments are those of `OcrReward` without `contains`.
    """

    def _score(self, wanted: str, read: str) -> float:
        return float(wanted == read)


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
