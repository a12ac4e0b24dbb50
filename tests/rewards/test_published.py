"""Values that the projects' own code gave, on weights, pictures, videos and detections of a formula.

Flow-GRPO's `pickscore_scorer.py`, `aesthetic_scorer.py`, `ocr.py`; HPSv2's `img_score.py` on its own open_clip, and
DiffusionNFT's `hpsv2_scorer.py`; torchmetrics 1.9, MixGRPO's and DiffusionNFT's `clip_score.py`; GenEval's
`evaluate_images.py` after mmdetection 2.28's post-processing; DanceGRPO's copy of VideoAlign with transformers 4.45 and
peft 0.13; torchvision 0.28. Only weights, paddleocr's reading, and vocabularies were replaced.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.rewards._videoalign_pixels import frame_indices, frame_size
from dancegrpo_fast.rewards._videoalign_prompt import QUESTION
from dancegrpo_fast.rewards.aesthetic import Aesthetic
from dancegrpo_fast.rewards.clip import clip_model, load_towers
from dancegrpo_fast.rewards.clip_score import ClipScore
from dancegrpo_fast.rewards.geneval import POSITIONS, Found, GenEval, relations
from dancegrpo_fast.rewards.hps import Hps
from dancegrpo_fast.rewards.ocr import OcrReward
from dancegrpo_fast.rewards.pickscore import PickScore
from dancegrpo_fast.rewards.pixels import letterbox_pixels, resize_and_crop
from dancegrpo_fast.rewards.videoalign import VideoReward

from ..tolerances import assert_same_cosines, assert_same_resize
from .formula import (
    OBJECTS,
    PROMPTS,
    QUESTIONS,
    aesthetic_layers,
    boxes,
    clip,
    clip_folder,
    fill,
    picture,
    scene,
    spread,
    wishes,
)
from .open_clip_style import OpenClip
from .tiny_clip import save_tokenizer
from .tiny_videoreward import make_base, trained_model, write_checkpoint


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def three(height: int = 37, width: int = 45, prompts: Sequence[str] = PROMPTS) -> RewardInput:
    frames = torch.stack([picture(height, width, number) for number in range(3)])[:, None].float() / 255
    return RewardInput(frames, prompts, torch.zeros(3, dtype=torch.int64), [{}] * 3)


@pytest.fixture(scope="module")
def formula_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("formula"))


def test_pickscore(formula_clip: Path) -> None:
    found = PickScore(formula_clip, tokenizer=formula_clip, scale="logit/26")(three())
    wanted = torch.tensor([1.0910661, 2.6354594, 2.0453317], dtype=torch.float64)
    assert_same_cosines(found, wanted, torch.float32, 100.0 / 26.0)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((37, 45), [0.2836772, 0.6852194, 0.5317862]), ((28, 28), [0.3611994, 0.4730541, 0.3709440])],
)
def test_clip_score(formula_clip: Path, size: tuple[int, int], wanted: list[float]) -> None:
    """The larger by torchmetrics and MixGRPO, which agree; the other by DiffusionNFT, whose resize is bilinear."""
    found = ClipScore(formula_clip)(three(*size))
    assert_same_cosines(found, torch.tensor(wanted, dtype=torch.float64), torch.float32)


def test_hps(tmp_path: Path) -> None:
    """Both scorers agree. The last prompt is longer than the context."""
    words = save_tokenizer(tmp_path)
    torch.save({"state_dict": fill(OpenClip(words)).state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    prompts = ("A Red  bird\n", "two BLUE cats &lt a fish", "b c d f g h j k l m n p q r s t v w x y z")
    wanted = torch.tensor([0.2935401, 0.3348887, 0.4334787], dtype=torch.float64)
    assert_same_cosines(Hps(tmp_path, tmp_path)(three(prompts=prompts)), wanted, torch.float32)


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


@pytest.fixture(scope="module")
def formula_videoreward(tmp_path_factory: pytest.TempPathFactory) -> VideoReward:
    base = make_base(tmp_path_factory.mktemp("base"))
    model = fill(trained_model(base))
    model.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("videoreward"), model, "full-old")
    return VideoReward(str(checkpoint), str(base), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("size", "length", "fps", "grid", "ids", "pixels", "wanted"),
    [
        (
            (30, 44),
            9,
            4.0,
            [2, 20, 28],
            ["952db6b22739c572", "de44c5b6c0fe6f33"],
            [1.71136, -0.7916, 0.53903],
            [[-0.5957955, 3.6482892, -0.1087383], [-0.836566, 3.4899893, -0.1111454]],
        ),
        (
            (200, 120),
            17,
            8.0,
            [2, 30, 18],
            ["e5fa68aae61be166", "1f6b6b3e45074f55"],
            [0.806257, 0.61913, 0.055547],
            [[-0.9436352, 3.5916953, -0.2306065], [-0.998201, 3.4808118, -0.2344646]],
        ),
    ],
)
def test_videoalign(
    formula_videoreward: VideoReward,
    size: tuple[int, int],
    length: int,
    fps: float,
    grid: list[int],
    ids: list[str],
    pixels: list[float],
    wanted: list[list[float]],
) -> None:
    """The grid of patches, the tokens, three pixels, and VQ, MQ and TA of two videos."""
    frames = torch.stack([clip(length, *size, number) for number in range(2)]).float() / 255
    seen: dict[str, torch.Tensor] = {}
    handle = formula_videoreward.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    found = formula_videoreward.scores(RewardInput(frames, QUESTIONS, torch.zeros(2), [{}] * 2, fps), 2)
    handle.remove()
    assert seen["video_grid_thw"].tolist() == [grid] * 2
    padding = formula_videoreward._tokenizer.pad_token_id
    assert [digest(str(row[row != padding].tolist()).encode()) for row in seen["input_ids"]] == ids
    values = seen["pixel_values_videos"]
    places = [5, len(values) // 3, len(values) - 2], [100, 700, 1100]
    assert_same_resize(values[places], torch.tensor(pixels, dtype=torch.float64))
    scores = torch.tensor(wanted, dtype=torch.float64)
    assert_same_cosines(found, scores, torch.float32, float(scores.abs().max()))


@pytest.mark.parametrize(
    ("size", "length", "fps", "wanted", "frames"),
    [
        ((480, 832), 81, 16, (336, 588), [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        ((512, 512), 53, 12, (448, 448), [0, 7, 15, 22, 30, 37, 45, 52]),
        ((720, 1280), 129, 24, (336, 588), [0, 14, 28, 43, 57, 71, 85, 100, 114, 128]),
        ((240, 416), 17, 8, (252, 420), [0, 5, 11, 16]),
        ((1216, 832), 49, 15, (532, 364), [0, 10, 19, 29, 38, 48]),
        ((100, 700), 3, 8, (140, 840), [0, 2]),
        ((256, 256), 200, 30, (336, 336), [0, 15, 31, 46, 61, 77, 92, 107, 122, 138, 153, 168, 184, 199]),
    ],
)
def test_what_videoalign_sees(
    size: tuple[int, int], length: int, fps: float, wanted: tuple[int, int], frames: list[int]
) -> None:
    assert frame_size(*size, 28, 200704) == wanted
    assert frame_indices(length, fps, 2.0) == frames


def test_relations_of_geneval() -> None:
    """Of 96 pairs of boxes: the sum of 1 for left, 2 for right, 4 for above and 8 for below, in hexadecimal."""
    wanted = "004284402820228440a214412482948880822000004011024408420a8621012204880440184084002804800009104080"
    bits = {name: 1 << place for place, name in enumerate(POSITIONS)}
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = [[Found((a, b, c, d), mask) for a, b, c, d in pair] for pair in boxes(96).tolist()]
    assert "".join(f"{sum(bits[name] for name in relations(*pair)):x}" for pair in found) == wanted


def without_a_detector(formula_clip: Path) -> GenEval:
    reward = GenEval.__new__(GenEval)
    reward.towers, reward._colors = load_towers(clip_model, formula_clip, formula_clip, "float32", "cpu"), {}
    return reward


def test_colors_of_geneval(formula_clip: Path) -> None:
    """On noise, of which half a pixel of the crop's odd margin chooses another color for the first."""
    reward = without_a_detector(formula_clip)
    mask = torch.ones(30, 41, dtype=torch.bool)
    mask[5, 10] = False
    noise = ((spread((3, 3, 30, 41), 1) + 1) * 128).byte()
    found = [reward._color(pixels, Found((10, 5, 31, 20), mask), "cat") for pixels in noise]
    assert found == ["pink", "blue", "blue"]


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (0, "111110000100010000000010000000000001100000"),
        (1, "111110000010100000000000100000000000100000"),
    ],
)
def test_verdicts_of_geneval(formula_clip: Path, number: int, wanted: str) -> None:
    """Of what a detector says of a picture to what is right of each prompt, colours by CLIP."""
    logits, masks = scene(number)
    said = SimpleNamespace(class_queries_logits=logits[None], masks_queries_logits=masks[None])
    image = {"pixel_values": torch.zeros(1, 3, 37, 45), "pixel_mask": torch.ones(1, 37, 45)}
    reward = without_a_detector(formula_clip)
    reward._names, reward._thresholds = dict(enumerate(OBJECTS)), (0.3, 0.9)
    reward._processor = lambda pixels, return_tensors: image
    reward._model = Mock(return_value=said, device=torch.device("cpu"), dtype=torch.float32)
    meta = wishes()
    frames = picture(37, 45, number).float().expand(len(meta), 1, -1, -1, -1) / 255
    found = reward(RewardInput(frames, [""] * len(meta), torch.zeros(len(meta)), meta))
    assert "".join(f"{int(score)}" for score in found) == wanted


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
