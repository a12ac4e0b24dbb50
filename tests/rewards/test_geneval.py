"""GenEval's rules in closed form, and a tiny Mask2Former through the real classes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.rewards import build_reward
from dancegrpo_fast.rewards.geneval import COLORS, Found, GenEval, instances, is_correct, relations

from ..train.tiny import RewardSettings
from .tiny_clip import make_inputs, save_clip


def box(left: float, top: float, right: float, bottom: float) -> Found:
    return Found((left, top, right, bottom), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ((0, 0, 10, 10), (50, 0, 60, 10), {"left of"}),
        ((50, 0, 60, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}),
        ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}),
        # Centres 4 apart are less than a tenth of both widths, 5.
        ((0, 0, 20, 20), (-1, 0, 29, 20), set()),
        ((3, 4, 5, 6), (3, 4, 5, 6), set()),
        # Mostly beside each other: 30 across, 10 down of a length of 31.6, the latter shortened by 2.
        ((0, 0, 10, 10), (30, 10, 40, 20), {"left of"}),
    ],
)
def test_relations(one: Any, other: Any, wanted: set[str]) -> None:
    assert relations(box(*one), box(*other)) == wanted


def red(one: Found, name: str) -> str:
    return "red"


CAT, DOG, FAR = box(0, 0, 10, 10), box(50, 0, 60, 10), box(0, 90, 10, 100)


@pytest.mark.parametrize(
    ("objects", "meta", "wanted"),
    [
        ({"cat": [CAT]}, {"include": [{"class": "cat", "count": 1}]}, True),
        ({}, {"include": [{"class": "cat", "count": 1}]}, False),
        ({"cat": [CAT]}, {"include": [{"class": "cat", "count": 2}]}, False),
        ({"cat": [CAT, DOG]}, {"include": [{"class": "cat", "count": 1}]}, True),
        (
            {"cat": [CAT, DOG]},
            {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 2}]},
            False,
        ),
        ({"cat": [CAT]}, {"include": [{"class": "cat", "count": 1, "color": "red"}]}, True),
        ({"cat": [CAT]}, {"include": [{"class": "cat", "count": 1, "color": "blue"}]}, False),
        (
            {"cat": [CAT], "dog": [DOG]},
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]},
            True,
        ),
        (
            {"cat": [CAT], "dog": [FAR, DOG]},
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]},
            False,
        ),
        (
            {"dog": [DOG]},
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]},
            False,
        ),
    ],
)
def test_rules(objects: Any, meta: Any, wanted: bool) -> None:
    assert is_correct(objects, meta, red) is wanted


def test_instances_are_masks_and_their_confidence() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 9.0]])
    masks = torch.full((3, 4, 6), -5.0)
    masks[0, 1:3, 2:5] = 2.0
    masks[1, :, :2] = 1.0
    found = instances(logits, masks, 4, 6, kept=4)
    first, second = found[:2]
    assert (first[0], second[0]) == (0, 1) or (first[0], second[0]) == (1, 0)
    by_class = {label: (score, where) for label, score, where in found[:2]}
    probabilities = logits.softmax(dim=-1)
    assert by_class[0][1].box == (2, 1, 5, 3)
    assert by_class[1][1].box == (0, 0, 2, 4)
    torch.testing.assert_close(torch.tensor(by_class[0][0]), probabilities[0, 0] * torch.tensor(2.0).sigmoid())
    torch.testing.assert_close(torch.tensor(by_class[1][0]), probabilities[1, 1] * torch.tensor(1.0).sigmoid())
    # The third query's mask is empty.
    assert all(where.mask.any() for _, _, where in found)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    folder = tmp_path_factory.mktemp("detector")
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        id2label={0: "cat", 1: "dog"},
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Mask2FormerImageProcessor", "size": {"shortest_edge": 48, "longest_edge": 64},'
        ' "size_divisor": 32, "ignore_index": 255}'
    )
    assert AutoImageProcessor.from_pretrained(folder).size.longest_edge == 64
    return folder


@pytest.fixture(scope="module")
def scorer(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> GenEval:
    clip = save_clip(tmp_path_factory.mktemp("clip"))
    args = {"path": str(detector), "clip": str(clip), "threshold": 0.0, "device": "cpu"}
    built = build_reward(RewardSettings("geneval", args=args))
    assert isinstance(built, GenEval)
    return built


def test_through_the_real_classes(scorer: GenEval) -> None:
    inputs = make_inputs(3)
    wanted = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    absent = {"tag": "single_object", "include": [{"class": "cat", "count": 100}]}
    # With a threshold of 0 the untrained detector finds both classes wherever a mask is not empty.
    scores = scorer(replace(inputs, meta=[wanted, absent, wanted]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 0.0, 1.0]
    one = replace(inputs, frames=inputs.frames[2:], prompts=inputs.prompts[2:], meta=[wanted], group=inputs.group[2:])
    assert scorer(one).tolist() == [1.0]


def test_color_is_clips_choice_on_the_masked_crop(scorer: GenEval) -> None:
    pixels = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[5:20, 10:30] = True
    mask[5, 10] = False
    chosen = scorer._color(pixels, Found((10, 5, 30, 20), mask), "cat")
    crop = pixels[:, 5:20, 10:30].clone()
    crop[:, 0, 0] = 0x99
    from dancegrpo_fast.rewards.pixels import clip_pixels

    image = scorer.towers.images(crop[None], clip_pixels, 1)[0]
    scores = []
    for color in COLORS:
        texts = [f"a photo of a {color} cat", f"a photo of a {color}-colored cat", f"a photo of a {color} object"]
        mean = scorer.towers.texts(texts, 3).mean(dim=0)
        scores.append(float(mean / mean.norm() @ image))
    assert chosen == COLORS[scores.index(max(scores))]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"tag": "colors"}, "tag and include"),
        ({"tag": "colors", "include": [{"class": "yeti", "count": 1}]}, 'class "yeti"'),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "mauve"}]}, 'color "mauve"'),
    ],
)
def test_foreign_prompts_are_refused(scorer: GenEval, meta: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer(replace(make_inputs(1), meta=[meta]))


def test_videos_are_refused(scorer: GenEval) -> None:
    with pytest.raises(ValueError, match="frames: got"):
        scorer(make_inputs(1, length=2))
