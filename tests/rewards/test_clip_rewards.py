"""CLIP score, PickScore and what all rewards on CLIP share, against transformers' CLIPModel and processor."""

import gc
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.rewards import RewardInput, RewardSet
from dancegrpo_fast.rewards import clip as clip_module
from dancegrpo_fast.rewards.clip import ClipReward
from dancegrpo_fast.rewards.clip_score import ClipScore
from dancegrpo_fast.rewards.frames import sampled_indices
from dancegrpo_fast.rewards.pickscore import PickScore

from ..tolerances import assert_same_cosines
from .tiny_clip import CONTEXT, PROMPTS, SIZES, as_pil, make_inputs, pillow_processor, save_clip, without

SCALES = {"cosine": 1.0, "logit": 100.0, "logit/26": 100.0 / 26.0}


def reference(folder: Path, inputs: RewardInput) -> torch.Tensor:
    """Cosine of every frame with its prompt, float64 [N, T], by transformers alone."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).double().eval()
    processor = pillow_processor(model.config.vision_config.image_size)
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(inputs.prompts), padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    rows = []
    for sample, frames in enumerate(inputs.frames):
        pixels = processor([as_pil(frame) for frame in frames], return_tensors="pt")["pixel_values"]
        text = {name: tokens[name][sample : sample + 1] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(pixel_values=pixels.double(), **text).logits_per_image.squeeze(1)
        rows.append(logits / model.logit_scale.exp().detach())
    return torch.stack(rows)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_score_is_transformers(clip: Path, height: int, width: int) -> None:
    inputs = make_inputs(height=height, width=width)
    wanted = reference(clip, inputs)[:, 0]
    assert_same_cosines(ClipScore(clip)(inputs), wanted, torch.float32)
    assert len(set(wanted.tolist())) == len(wanted)
    assert ClipScore(clip)(make_inputs(0)).shape == (0,)


def test_size_of_the_configuration(tmp_path: Path) -> None:
    folder = save_clip(tmp_path, seed=1, image_size=42)
    inputs = make_inputs()
    assert_same_cosines(ClipScore(folder)(inputs), reference(folder, inputs)[:, 0], torch.float32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pickscore(clip: Path, scale: str, height: int, width: int) -> None:
    inputs = make_inputs(height=height, width=width)
    found = PickScore(clip, tokenizer=clip, scale=scale)(inputs)  # type: ignore[arg-type]  # one of its literals
    assert_same_cosines(found, SCALES[scale] * reference(clip, inputs)[:, 0], torch.float32, SCALES[scale])


def test_frames_of_a_video(clip: Path) -> None:
    inputs = make_inputs(3, length=5)
    every = reference(clip, inputs)
    for frames, wanted in (
        ("first", every[:, 0]),
        ("middle", every[:, 2]),
        ("all", every.mean(1)),
        (1, every[:, 2]),
        (2, every[:, [1, 3]].mean(1)),
        (5, every.mean(1)),
    ):
        assert_same_cosines(ClipScore(clip, frames=frames)(inputs), wanted, torch.float32)  # type: ignore[arg-type]


def test_sampled_indices() -> None:
    assert sampled_indices(4, 53) == [6, 19, 33, 46]
    assert sampled_indices("middle", 4) == sampled_indices(1, 4) == [2]
    for length in range(1, 9):
        assert sampled_indices(length, length) == sampled_indices("all", length) == list(range(length))
        for count in range(1, length + 1):
            middles = [(part + Fraction(1, 2)) * length / count for part in range(count)]
            assert sampled_indices(count, length) == [int(middle) for middle in middles]


def test_a_long_prompt_is_cut_before_its_end(clip: Path) -> None:
    """All but the last of CONTEXT tokens are start and prompt, the last one is the end."""
    towers = ClipScore(clip).towers
    letters = "bcdfghjklmnpqrstuvwxyz"
    cut = " ".join(letters[: CONTEXT - 2])
    found = towers.texts([cut, cut + " and what follows", " ".join(letters[: CONTEXT - 3])], batch=3)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_each_prompt_is_encoded_once(clip: Path) -> None:
    reward = ClipScore(clip, batch=2)
    seen: list[int] = []
    reward.towers._model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    inputs = make_inputs(4)
    first = reward(inputs)
    assert sum(seen) == len(set(PROMPTS)) == 3
    assert max(seen) == 2
    assert torch.equal(reward(inputs), first)
    assert sum(seen) == 3
    reward(replace(inputs, prompts=[*PROMPTS[:3], "another"]))
    assert sum(seen) == 4


def test_only_so_many_prompts_are_remembered(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = ClipScore(clip).towers
    wanted = towers.texts(["a red bird", "two blue cats", "red", "bird"], batch=4)
    monkeypatch.setattr(clip_module, "REMEMBERED", 3)
    assert_same_cosines(towers.texts(["bird", "cat"], batch=4)[0], wanted[3].double(), torch.float32)
    assert set(towers._known) == {"bird", "cat"}
    # a call may need more than are remembered
    four = towers.texts(["a red bird", "two blue cats", "red", "bird"], batch=4)
    assert torch.equal(four, wanted)


def test_equal_towers_are_shared_while_they_live(clip: Path) -> None:
    one, other = ClipScore(clip), PickScore(clip, tokenizer=clip)
    assert one.towers is other.towers
    assert ClipScore(clip, dtype="bfloat16").towers is not one.towers
    gone = weakref.ref(one.towers)
    del one, other
    gc.collect()
    assert gone() is None


def test_moving_a_set_moves_its_weights(clip: Path) -> None:
    args = {"path": str(clip), "dtype": "float16"}
    rewards = RewardSet([RewardSettings("clip_score", args=args), RewardSettings(f"{__name__}:brightness")])
    reward: Any = rewards._rewards[0]
    assert isinstance(reward, ClipReward)
    rewards.to("meta")
    assert {p.device.type for p in reward.towers._model.parameters()} == {"meta"}
    assert reward.towers.device == torch.device("meta")


def brightness(inputs: RewardInput) -> torch.Tensor:
    return inputs.frames.mean(dim=(1, 2, 3, 4))


def test_by_name_and_thresholds(clip: Path) -> None:
    inputs = make_inputs()
    cosines = ClipScore(clip)(inputs)
    threshold = float(cosines.median())
    picked = {"path": str(clip), "tokenizer": str(clip), "scale": "cosine"}
    rewards = RewardSet(
        [
            RewardSettings("clip_score", args={"path": str(clip)}),
            RewardSettings("clip_score", args={"path": str(clip)}, threshold=threshold),
            RewardSettings("pickscore", args=picked),
        ]
    )
    assert rewards.names == ["clip_score", f"clip_score>{threshold:g}", "pickscore"]
    assert torch.equal(rewards(inputs), torch.stack([cosines, (cosines > threshold).float(), cosines]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dtype": "float64"}, "dtype: got 'float64'"),
        ({"batch": 0}, "batch: got 0"),
        ({"frames": "last"}, "frames: got 'last'"),
        ({"frames": 0}, "frames: got 0"),
        ({"frames": True}, "frames: got True"),
        ({"path": "/no/such/folder"}, "path: got '/no/such/folder', want an existing"),
        ({"path": "./clip"}, r"path: got './clip', want an existing"),
        ({"tokenizer": "/no/such/folder"}, "tokenizer: got '/no/such/folder', want an existing"),
    ],
    ids=str,
)
def test_bad_arguments(clip: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipScore(**{"path": clip, "tokenizer": clip, **args})


def test_bad_scale(clip: Path) -> None:
    with pytest.raises(ValueError, match="scale: got 'percent'"):
        PickScore(clip, tokenizer=clip, scale="percent")  # type: ignore[arg-type]


def test_a_folder_without_all_weights(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: got .* does not load"):
        ClipScore(tmp_path, tokenizer=clip)
    with pytest.raises(ValueError, match=r"tokenizer: got .* does not load"):
        ClipScore(clip, tokenizer=tmp_path)
    part = without("vision_model.post_layernorm.weight", clip, tmp_path / "part")
    with pytest.raises(ValueError, match=r"path: got .*1 of its weights are not there, vision_model.post_layernorm"):
        ClipScore(part)


@pytest.mark.parametrize(
    ("changes", "frames", "message"),
    [
        ({"frames": torch.zeros(4, 3, 8, 8)}, "all", r"frames: got torch.float32 \(4, 3, 8, 8\)"),
        ({"frames": torch.zeros(4, 1, 3, 8, 8, dtype=torch.uint8)}, "all", "frames: got torch.uint8"),
        ({"frames": torch.zeros(4, 1, 1, 8, 8)}, "all", "frames: got"),
        ({"frames": torch.zeros(4, 0, 3, 8, 8)}, "all", "frames: got"),
        ({"frames": torch.full((4, 1, 3, 8, 8), 1.5)}, "all", r"frames: got values from 1.5 to 1.5"),
        ({"frames": torch.full((4, 1, 3, 8, 8), float("nan"))}, "all", "frames: got values from nan"),
        ({}, 2, "frames: got 2, want at most the 1"),
        ({"prompts": ["one"]}, "all", "prompts: got 1, want 4"),
    ],
    ids=str,
)
def test_bad_inputs(clip: Path, changes: dict[str, Any], frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipScore(clip, frames=frames)(make_inputs(**changes))
