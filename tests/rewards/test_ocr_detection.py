"""PP-OCR on pictures with text anywhere, and on videos."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.rewards.ocr import _AT_A_TIME, OcrExact, OcrReader, OcrReward


def picture(*texts: tuple[int, int, str], width: int = 320, height: int = 160, font: int = 28) -> Tensor:
    """Dark text of `font` pixels at (x, y) on a light ground, float32 [3, H, W]."""
    image = Image.new("RGB", (width, height), (205, 220, 240))
    draw = ImageDraw.Draw(image)
    for x, y, text in texts:
        draw.text((x, y), text, fill=(25, 20, 60), font=ImageFont.load_default(font))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def inputs(frames: Tensor, *prompts: str) -> RewardInput:
    """Of float32 [B, T, 3, H, W]."""
    return RewardInput(frames, prompts, torch.zeros(len(prompts)), [{} for _ in prompts])


def test_lines_are_found_and_read_in_order() -> None:
    images = torch.stack(
        [
            picture((30, 105, "until noon"), (190, 21, "late"), (20, 20, "Open")),
            picture(),
            picture((90, 60, "Fresh fish")),
        ]
    )
    assert OcrReader()(images) == ["Open late until noon", "", "Fresh fish"]


def test_detection_finds_what_one_line_cannot_hold() -> None:
    frames = picture((20, 20, "Open"), (30, 105, "until noon"))[None, None]
    prompt = 'a sign that says "open until noon"'
    assert OcrExact()(inputs(frames, prompt)).tolist() == [1.0]
    assert OcrExact(detect=False)(inputs(frames, prompt)).tolist() == [0.0]


def test_a_line_in_a_large_picture() -> None:
    """However it lies, and with another one beside it."""
    line, both = [(80, 120, "Hello World")], [(80, 120, "Hello World"), (80, 300, "and others")]
    plain, two = (picture(*texts, width=512, height=512, font=60) for texts in (line, both))
    found = OcrReader()(torch.stack([plain.rot90(2, (1, 2)), plain.rot90(1, (1, 2)), two]))
    assert found == ["Hello World", "Hello World", "Hello World and others"]


@pytest.mark.parametrize(
    ("height", "width", "font", "detect"),
    [
        *[(120, 420, 70, False), (96, 200, 24, True)],
        pytest.param(32, 130, 20, False, marks=pytest.mark.release),
        pytest.param(48, 190, 28, False, marks=pytest.mark.release),
        pytest.param(360, 640, 80, True, marks=pytest.mark.release),
    ],
)
def test_images_of_any_size(height: int, width: int, font: int, detect: bool) -> None:
    place = (20, height // 3) if detect else (font // 4, font // 4)
    frames = torch.stack(
        [picture((*place, text), height=height, width=width, font=font) for text in ("harbour", "fish")]
    )
    given = inputs(frames[:, None], 'a sign that says "harbour"', 'a sign that says "dish"')
    assert OcrExact(detect=detect)(given).tolist() == [1.0, 0.0]
    assert OcrReward(detect=detect)(given).tolist() == [1.0, 0.75]


def line(text: str) -> Tensor:
    return picture((10, 6, text), width=190, height=48)


def test_videos_score_the_mean_of_their_frames() -> None:
    """Three of four frames right, one with a wrong letter of eight; another video shown in reverse."""
    video = torch.stack([line("harbours"), line("harbours"), line("harbour5"), line("harbours")])
    both = inputs(torch.stack([video, video.flip(0)]), '"harbours"', '"Harbours"')
    assert OcrExact(detect=False)(both).tolist() == [0.75, 0.75]
    assert OcrReward(detect=False)(both).tolist() == [1 - 1 / 32] * 2
    assert OcrReward(detect=False, frames="middle")(both).tolist() == [1 - 1 / 8, 1.0]
    assert OcrExact(detect=False, frames="first")(both).tolist() == [1.0, 1.0]
    assert OcrExact(detect=False, frames=2)(both).tolist() == [1.0, 0.5]


def test_more_images_than_are_read_at_a_time() -> None:
    pictures = [line(text) for text in ("harbours", "fish", "late")]
    found = OcrReader(detect=False)(torch.stack([pictures[i % 3] for i in range(_AT_A_TIME + 2)]))
    assert found == [("harbours", "fish", "late")[i % 3] for i in range(_AT_A_TIME + 2)]
    assert OcrReader(detect=False)(torch.empty(0, 3, 48, 190)) == []


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="frames: got 0"):
        OcrReward(frames=0)
    with pytest.raises(ValueError, match=r"frames: got torch.float32 \(1, 3, 48, 190\), want floats \[B, T, 3, H, W\]"):
        OcrReward()(inputs(line("x")[None], '"x"'))
    with pytest.raises(ValueError, match="frames: got 2, want at most the 1"):
        OcrReward(frames=2)(inputs(line("x")[None, None], '"x"'))
    with pytest.raises(ValueError, match=r"frames: got values from .* to 2, want \[0, 1\]"):
        OcrReward()(inputs(2 * line("x")[None, None].round(), '"x"'))
    with pytest.raises(ValueError, match="prompts: got 2, want 1"):
        OcrReward()(inputs(line("x")[None, None], '"x"', '"y"'))
