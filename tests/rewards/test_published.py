"""Values that the projects' own code gave, on weights and pictures of a formula.

Flow-GRPO's `pickscore_scorer.py`, `aesthetic_scorer.py`, `ocr.py`, DiffusionNFT's `hpsv2_scorer.py`, DanceGRPO's copy
of VideoAlign's `prompt_template.py`, and torchvision 0.28. Only weights, and paddleocr's reading, were replaced.
"""

import hashlib
from pathlib import Path

import pytest
import torch

from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.rewards._videoalign_prompt import QUESTION
from dancegrpo_fast.rewards.aesthetic import Aesthetic
from dancegrpo_fast.rewards.ocr import OcrReward
from dancegrpo_fast.rewards.pickscore import PickScore
from dancegrpo_fast.rewards.pixels import letterbox_pixels, resize_and_crop

from ..tolerances import assert_same_cosines, assert_same_resize
from .formula import PROMPTS, aesthetic_layers, clip_folder, picture


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def three() -> RewardInput:
    frames = torch.stack([picture(37, 45, number) for number in range(3)])[:, None].float() / 255
    return RewardInput(frames, PROMPTS, torch.zeros(3, dtype=torch.int64), [{}] * 3)


@pytest.fixture(scope="module")
def formula_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("formula"))


def test_pickscore(formula_clip: Path) -> None:
    found = PickScore(formula_clip, tokenizer=formula_clip, scale="logit/26")(three())
    wanted = torch.tensor([1.0910661, 2.6354594, 2.0453317], dtype=torch.float64)
    assert_same_cosines(found, wanted, torch.float32, 100.0 / 26.0)


def test_aesthetic(formula_clip: Path, tmp_path: Path) -> None:
    torch.save(aesthetic_layers(), tmp_path / "head.pth")
    wanted = torch.tensor([0.4819405, 0.5312001, 0.5751169], dtype=torch.float64)
    assert_same_cosines(Aesthetic(formula_clip, tmp_path / "head.pth")(three()), wanted, torch.float32)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((544, 960), "2d1433e92d33cf35"),
        ((480, 848), "02695c5debb216ce"),
        ((832, 1216), "0bed38d8e7e66b40"),
        ((1216, 832), "1d2fca5f4c8e3db9"),
        ((512, 512), "c159563555b49598"),
        ((600, 641), "90f658e313c46ed4"),
    ],
)
def test_torchvisions_square(size: tuple[int, int], wanted: str) -> None:
    """All but a square leave odd margins, of which another half is rounded up."""
    found = resize_and_crop(picture(*size), 224, even=True)
    assert digest(found.permute(1, 2, 0).contiguous().numpy().tobytes()) == wanted
    assert torch.equal(found, resize_and_crop(picture(*size), 224)) == (size == (512, 512))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((37, 45), [0.321488, -0.311604, -0.945402, -0.179388, -0.830231, -1.481789, -0.558859, -1.175538, -1.167523]),
        ((90, 61), [-1.25202, -1.070094, 0.192266, -1.683922, -0.409368, 0.888389, -0.868806, 0.360837, 1.590479]),
        ((17, 30), [1.196126, 0.773537, 0.351233, 0.719775, 0.285337, -0.148808, 0.293111, -0.118525, -0.529884]),
    ],
)
def test_pixels_of_hps(size: tuple[int, int], wanted: list[float]) -> None:
    """Three places in the middle row of each channel."""
    found = letterbox_pixels(picture(*size)[None], 28)[0, :, 13, [4, 13, 22]].flatten()
    assert_same_resize(found, torch.tensor(wanted, dtype=torch.float64))


def test_the_question_of_videoalign() -> None:
    assert digest(QUESTION.replace("{text_prompt}", "a {fox} runs").encode()) == "8e49d8ecaeef8f4e"


@pytest.mark.parametrize(
    ("text", "lines", "wanted"),
    [
        ("Hello World", ["Hello World"], 1.0),
        ("Hello World", ["hello", "WORLD"], 1.0),
        ("Hello World", ["Hello World", "and others"], 1.0),
        ("Hello World", ["He1lo World"], 0.9),
        ("Hello World", ["dlroW olleH"], 0.4),
        ("Hello World", [], 0.0),
        ("2049", ["9402"], 0.0),
        ("2049", ["1 2049 7"], 1.0),
        ("2049", ["204", "9"], 1.0),
        ("Open", ["Opem", "until noon"], 0.0),
        ("NASA 2049", ["NASA 2O49"], 0.875),
        ("ab", ["xxaxbx"], 0.0),
    ],
)
def test_scores_of_readings(text: str, lines: list[str], wanted: float) -> None:
    reward = OcrReward.__new__(OcrReward)
    reward.frames, reward.contains = "all", True
    reward.reader = lambda images: [" ".join(lines)]  # type: ignore[assignment]  # instead of a network
    inputs = RewardInput(torch.zeros(1, 1, 3, 4, 4), [f'a "{text}" sign'], torch.zeros(1), [{}])
    assert float(reward(inputs)[0]) == pytest.approx(wanted)
