"""GenEval's rules in closed form, and a tiny Mask2Former through the real classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.rewards import build_reward
from dancegrpo_fast.rewards.geneval import COLORS, Found, GenEval, instances, is_correct, relations

from ..train.tiny import RewardSettings
from .tiny_clip import make_inputs, without


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
ONE = {"class": "cat", "count": 1}
BESIDE = {"include": [ONE, {"class": "dog", "count": 1, "position": ["right of", 0]}]}


@pytest.mark.parametrize(
    ("objects", "meta", "wanted"),
    [
        ({"cat": [CAT]}, {"include": [ONE]}, True),
        ({}, {"include": [ONE]}, False),
        ({"cat": [CAT]}, {"include": [ONE | {"count": 2}]}, False),
        ({"cat": [CAT, DOG]}, {"include": [ONE]}, True),
        ({"cat": [CAT, DOG]}, {"include": [ONE], "exclude": [ONE | {"count": 2}]}, False),
        ({"cat": [CAT]}, {"include": [ONE | {"color": "red"}]}, True),
        ({"cat": [CAT]}, {"include": [ONE | {"color": "blue"}]}, False),
        ({"cat": [CAT], "dog": [DOG]}, BESIDE, True),
        ({"cat": [CAT], "dog": [FAR, DOG]}, BESIDE, False),
        ({"dog": [DOG]}, BESIDE, False),
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
    scores = [score for _, score, _ in found]
    assert scores == sorted(scores, reverse=True)
    assert {label for label, _, _ in found[:2]} == {0, 1}
    by_class = {label: (score, where) for label, score, where in found[:2]}
    probabilities = logits.softmax(dim=-1)
    assert by_class[0][1].box == (2, 1, 5, 3)
    assert by_class[1][1].box == (0, 0, 2, 4)
    torch.testing.assert_close(torch.tensor(by_class[0][0]), probabilities[0, 0] * torch.tensor(2.0).sigmoid())
    torch.testing.assert_close(torch.tensor(by_class[1][0]), probabilities[1, 1] * torch.tensor(1.0).sigmoid())
    # The third query's mask is empty.
    assert all(where.mask.any() for _, _, where in found)


# prompts/object_names.txt of djghosh13/geneval
OBJECTS = (  # one string: a list would be eighty lines
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
# as the detectors converted from mmdetection spell them
OLDER = COCO | {
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}


def save_detector(folder: Path, names: Sequence[str]) -> Path:
    from transformers import AutoImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = {"depths": [1] * 4, "num_heads": [1, 1, 2, 2], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    swin = SwinConfig(image_size=64, embed_dim=8, window_size=4, **stages)
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
        id2label=dict(enumerate(names)),
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
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_detector(tmp_path_factory.mktemp("detector"), ["cat", "dog"])


@pytest.fixture(scope="module")
def scorer(detector: Path, clip: Path) -> GenEval:
    args = {"path": str(detector), "clip": str(clip), "threshold": 0.0, "device": "cpu"}
    built = build_reward(RewardSettings("geneval", args=args))
    assert isinstance(built, GenEval)
    return built


@pytest.mark.parametrize("spelling", [COCO, pytest.param(OLDER, marks=pytest.mark.release)], ids=["coco", "older"])
def test_every_object_of_geneval_is_a_class(clip: Path, tmp_path: Path, spelling: dict[str, str]) -> None:
    names = OBJECTS.split(", ")
    folder = save_detector(tmp_path, [spelling.get(name, name) for name in names])
    scorer = GenEval(str(folder), str(clip), threshold=0.0, device="cpu")
    include = [[{"class": name, "count": 1}] for name in names]
    inputs = make_inputs(1)
    many = {"frames": inputs.frames.expand(80, -1, -1, -1, -1), "prompts": ["x"] * 80, "group": torch.zeros(80)}
    scores = scorer(replace(inputs, **many, meta=[{"tag": "single_object", "include": one} for one in include]))
    values = scorer._processor((inputs.frames[0, 0] * 255).byte().permute(1, 2, 0).numpy(), return_tensors="pt")
    classes = scorer._model(**values).class_queries_logits[0].softmax(dim=1)[:, :-1]
    found = set((classes.flatten().topk(100).indices % 80).tolist())
    assert scores.nonzero().flatten().tolist() == sorted(found)
    assert 0 < len(found) < 80


@torch.no_grad()
def test_masks_of_unlikely_queries_change_nothing(detector: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector's own classes, sharpened so that a threshold divides its queries."""
    inputs = make_inputs(1)
    scorer = GenEval(str(detector), str(clip), threshold=0.0, device="cpu")
    predictor = scorer._model.class_predictor
    predictor.weight.mul_(40)
    predictor.bias[2] = 9  # no object
    pixels = (inputs.frames[0, 0] * 255).round().byte()
    values = scorer._processor(pixels.permute(1, 2, 0).numpy(), return_tensors="pt")
    output = scorer._model(**values)
    masks = scorer._cropped(output.masks_queries_logits[0], values["pixel_mask"][0])
    every = instances(output.class_queries_logits[0], masks, *pixels.shape[1:], 100)
    enlarged: list[int] = []
    original = GenEval._cropped
    spy = staticmethod(lambda masks, valid: enlarged.append(len(masks)) or original(masks, valid))
    monkeypatch.setattr(GenEval, "_cropped", spy)
    confidences = sorted(confidence for _, confidence, _ in every)
    for least in (confidences[len(confidences) // 2], confidences[-2], confidences[-1]):
        scorer._thresholds = least, least
        counts = [sum(label == one and confidence > least for label, confidence, _ in every) for one in (0, 1)]
        for name, count in zip(("cat", "dog"), counts, strict=True):
            for wanted in (max(count, 1), count + 1):
                meta = {"tag": "x", "include": [{"class": name, "count": wanted}]}
                assert scorer(replace(inputs, meta=[meta])).item() == float(wanted == count)
    assert 0 < min(enlarged) < len(masks)


def test_a_detector_without_all_weights(detector: Path, clip: Path, tmp_path: Path) -> None:
    part = without("class_predictor.weight", detector, tmp_path / "part")
    with pytest.raises(ValueError, match=r"path: got .*Mask2Former.*1 of its weights are not there, class_predictor"):
        GenEval(str(part), str(clip))


def test_through_the_real_classes(scorer: GenEval) -> None:
    inputs = make_inputs(3)
    wanted = {"tag": "single_object", "include": [ONE]}
    absent = {"tag": "single_object", "include": [ONE | {"count": 100}]}
    # With a threshold of 0 the untrained detector finds both classes wherever a mask is not empty.
    scores = scorer(replace(inputs, meta=[wanted, absent, wanted]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 0.0, 1.0]


def test_a_sample_alone_and_among_others(scorer: GenEval) -> None:
    """Each image with every colour, of which another one is right: scores are each image's own."""
    frames = make_inputs(8).frames[[0, 1, 5]]
    metas = [{"tag": "colors", "include": [ONE | {"color": color}]} for color in COLORS]
    samples = [(image, meta) for meta in metas for image in range(3)]

    def scores(part: list[tuple[int, Any]]) -> list[float]:
        given = make_inputs(len(part), frames=frames[[image for image, _ in part]], meta=[meta for _, meta in part])
        return scorer(given).tolist()

    together = scores(samples)
    assert together == [score for sample in samples for score in scores([sample])]
    assert [sum(together[image::3]) for image in range(3)] == [1.0] * 3
    assert len({together[image::3].index(1.0) for image in range(3)}) == 3


def test_color_is_clips_choice_on_the_masked_crop(scorer: GenEval) -> None:
    pixels = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[5:20, 10:30] = True
    mask[5, 10] = False
    chosen = scorer._color(pixels, Found((10, 5, 30, 20), mask), "cat")
    crop = pixels[:, 5:20, 10:30].clone()
    crop[:, 0, 0] = 0x99
    from dancegrpo_fast.rewards.pixels import openai_pixels

    image = scorer.towers.images(crop[None], openai_pixels, 1)[0]
    scores = []
    for color in COLORS:
        texts = [f"a photo of a {color} cat", f"a photo of a {color}-colored cat", f"a photo of a {color} object"]
        mean = scorer.towers.texts(texts, 3).mean(dim=0)
        scores.append(float(mean / mean.norm() @ image))
    assert chosen == COLORS[scores.index(max(scores))]


def test_foreign_prompts_and_videos_are_refused(scorer: GenEval) -> None:
    meta = {"tag": "single_object", "include": [ONE]}
    with pytest.raises(ValueError, match='color "mauve"'):
        scorer(make_inputs(1, meta=[{"tag": "colors", "include": [ONE | {"color": "mauve"}]}]))
    with pytest.raises(ValueError, match=r"frames: got .*want images"):
        scorer(make_inputs(1, length=2, meta=[meta]))
    with pytest.raises(ValueError, match=r"frames: got values .*want \[0, 1\]"):
        scorer(make_inputs(1, frames=torch.full((1, 1, 3, 8, 8), 2.0), meta=[meta]))
