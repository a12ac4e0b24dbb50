"""VideoAlign against transformers and peft on the same random weights."""

import functools
import gc
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.rewards import RewardInput, RewardSet
from dancegrpo_fast.rewards._videoalign_pixels import frame_indices, frame_size, patches
from dancegrpo_fast.rewards._videoalign_prompt import QUESTION, REWARD_TOKENS
from dancegrpo_fast.rewards._videoalign_weights import read_config
from dancegrpo_fast.rewards.videoalign import _SHARED, MotionQuality, TextAlignment, VideoQuality, VideoReward

from ..tolerances import assert_as_printed, assert_same_cosines, assert_within_budget
from .tiny_videoreward import LORA_TARGETS, make_base, trained_model, videos, write_checkpoint, write_config

DIMENSIONS = (VideoQuality, MotionQuality, TextAlignment)
FRAMES = [0, 3, 5, 8]  # of 9 at 4 a second
Truth = Callable[[int, int], Tensor]
PROMPTS = ("a red fox", "two {dogs} that run across a field of snow while the camera follows")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("videoreward"), trained_model(base), "full-old")


def load(checkpoint: Path, base: Path) -> VideoReward:
    return VideoReward(str(checkpoint), str(base), torch.float32, torch.device("cpu"))


def reference(base: Path, inputs: RewardInput, frames: list[int], dtype: torch.dtype) -> Tensor:
    """The published way, one video at a time and unpadded, LoRA beside the weights; raw scores, float64 [N, 3]."""
    model = trained_model(base).to(torch.bfloat16).to(dtype)
    model.load_state_dict(trained_model(base).state_dict())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens(list(REWARD_TOKENS), special_tokens=True)
    rows = []
    for video, prompt in zip(inputs.frames, inputs.prompts, strict=True):
        size = frame_size(*video.shape[-2:], 28, 200704)
        pixels, grid = patches((video[None, frames] * 255).round().byte(), size, 14, 2, 2)
        pad = "<|video_pad|>" * (grid[0] * grid[1] * grid[2] // 4)
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + pad
            + "<|vision_end|>"
            + QUESTION.replace("{text_prompt}", prompt)
            + "<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model.base_model.model(
                input_ids=ids,
                position_ids=torch.arange(ids.shape[1])[None, None].expand(3, 1, -1),
                pixel_values_videos=pixels.to(dtype),
                video_grid_thw=torch.tensor([grid]),
                output_hidden_states=True,
            ).hidden_states[-1]
        found = torch.isin(ids[0], torch.tensor(tokenizer.convert_tokens_to_ids(list(REWARD_TOKENS))))
        head = model.base_model.model.rm_head.weight
        rows.append((hidden[0, found].double() @ head[0].double()).detach())
    return torch.stack(rows)


def z_scores(raw: Tensor) -> Tensor:
    return (raw - torch.tensor([1.0, -1.0, 0.25]).double()) / torch.tensor([2.0, 0.5, 4.0]).double()


# Height and width: enlarged, upright, and larger than the model takes.
SIZES = [(30, 44), (200, 120), (480, 700)]


@pytest.fixture(scope="module")
def truth(base: Path) -> Truth:
    def of_size(height: int, width: int) -> Tensor:
        return z_scores(reference(base, videos(*PROMPTS, height=height, width=width), FRAMES, torch.float64))

    return functools.cache(of_size)


def scores(base: Path, checkpoint: Path, inputs: RewardInput, batch: int, dtype: Any) -> Tensor:
    """z-scores, float32 [N, 3]."""
    return torch.stack([kind(str(checkpoint), str(base), batch, dtype)(inputs) for kind in DIMENSIONS], dim=1)


@pytest.mark.parametrize(
    ("dtype", "batch", "size"),
    [
        ("float32", 2, SIZES[1]),
        ("bfloat16", 2, SIZES[0]),
        *(pytest.param("float32", *more, marks=pytest.mark.release) for more in ((1, SIZES[0]), (2, SIZES[2]))),
    ],
)
def test_scores(base: Path, checkpoint: Path, truth: Truth, dtype: str, batch: int, size: tuple[int, int]) -> None:
    """Padded or alone, a video scores what transformers and peft say of it alone."""
    inputs = videos(*PROMPTS, height=size[0], width=size[1])
    plain = z_scores(reference(base, inputs, FRAMES, getattr(torch, dtype)))
    assert_within_budget(scores(base, checkpoint, inputs, batch, dtype), truth(*size), plain.float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision(base: Path, checkpoint: Path, truth: Truth, dtype: str) -> None:
    inputs = videos(*PROMPTS, height=200, width=120)
    found, wanted = scores(base, checkpoint, inputs, 2, dtype), truth(200, 120)
    assert_same_cosines(found, wanted, getattr(torch, dtype), float(wanted.abs().max()))
    assert not torch.equal(found, scores(base, checkpoint, inputs, 2, "float32"))


@pytest.mark.parametrize("kind", ["full", "adapter", "adapter-old"])
def test_layouts(base: Path, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """Every layout of the same weights gives the same bits."""
    first = load(checkpoint, base)
    other = load(write_checkpoint(tmp_path, trained_model(base), kind), base)
    assert torch.equal(first.head, other.head)
    for (name, one), (_, two) in zip(first.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged_as_by_peft(base: Path, tmp_path: Path, rslora: bool) -> None:
    actual = load(write_checkpoint(tmp_path, trained_model(base, rslora), "adapter", rslora), base).model
    plain = trained_model(base, rslora).merge_and_unload().model.state_dict()
    truth = trained_model(base, rslora).double().merge_and_unload().model.state_dict()
    before = trained_model(base, rslora).unload().model.state_dict()
    for name, parameter in actual.named_parameters():
        assert_within_budget(parameter, truth[name], plain[name])
        merged = any(target in name for target in LORA_TARGETS) and not name.endswith("bias")
        assert torch.equal(parameter, before[name]) is not merged, name


def test_one_forward_for_all_three(base: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = VideoReward._forward

    def counted(self: VideoReward, frames: Tensor, prompts: Any) -> Tensor:
        rows.append(len(frames))
        return forward(self, frames, prompts)

    monkeypatch.setattr(VideoReward, "_forward", counted)
    args = {"path": str(checkpoint), "base": str(base), "dtype": "float32", "batch": 2}
    rewards = RewardSet([RewardSettings(f"videoalign_{name}", args=args) for name in ("vq", "mq", "ta")])
    inputs = videos(*PROMPTS, "a third")
    scores = rewards(inputs)
    assert rows == [2, 1]
    assert torch.equal(scores, torch.stack([kind(**args)(inputs) for kind in DIMENSIONS]))
    assert torch.equal(rewards(inputs), scores) and rows == [2, 1]
    assert not torch.equal(rewards(videos(*PROMPTS, "another")), scores) and rows == [2, 1, 2, 1]
    assert len({id(one.model) for one in rewards._rewards}) == 1  # type: ignore[attr-defined]
    del rewards
    gc.collect()
    assert not _SHARED


def test_moves(base: Path, checkpoint: Path) -> None:
    reward = VideoQuality(str(checkpoint), str(base), dtype="float32", device="cpu")
    assert reward.to("meta") is reward
    assert reward.model.head.is_meta and all(one.is_meta for one in reward.model.model.parameters())


def test_patches_are_those_of_transformers() -> None:
    """Its image processor shows an image as a video of two equal frames."""
    frames = (videos("x", length=1, height=56, width=84).frames[0] * 255).round().byte()
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 84, max_pixels=56 * 84)
    expected = processor(frames.permute(0, 2, 3, 1).numpy()[0], return_tensors="pt")
    actual, grid = patches(frames[None].expand(2, 2, -1, -1, -1), (56, 84), 14, 2, 2)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    for half in actual.chunk(2):
        torch.testing.assert_close(half, expected["pixel_values"])


def test_patches_hold_what_they_should() -> None:
    """Patch (t, i, j) of a video that needs no resize, found by walking over the merged tokens."""
    frames = (videos("x", length=4, height=56, width=84).frames * 255).round().byte()
    actual, grid = patches(frames, (56, 84), 14, 2, 2)
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    sizes = (2, 2, 3, 2, 2)
    places = [(t, 2 * row + i, 2 * column + j) for t, row, column, i, j in itertools.product(*map(range, sizes))]
    assert grid == (2, 4, 6) and len(actual) == len(places)
    for patch, (t, i, j) in zip(actual, places, strict=True):
        pixels = frames[0, 2 * t : 2 * t + 2, :, 14 * i : 14 * i + 14, 14 * j : 14 * j + 14].transpose(0, 1)
        torch.testing.assert_close(patch, ((pixels / 255 - mean) / std).flatten())


def test_resized_frames_are_bytes() -> None:
    """A ramp that overshoots is clipped and rounded, as a resize of bytes does."""
    frames = torch.zeros(1, 2, 3, 20, 20, dtype=torch.uint8)
    frames[..., 10:] = 255
    actual, _ = patches(frames, (28, 28), 14, 2, 2)
    mean, std = (torch.tensor(v).repeat_interleave(2 * 14 * 14) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    values = (actual * std + mean) * 255
    torch.testing.assert_close(values, values.round().clamp(0, 255))
    assert len(values.round().unique()) > 2


@pytest.mark.parametrize(
    ("length", "fps", "rate", "count"),
    [
        (81, 16, 2, 10),
        (16, 8, 2, 4),
        (9, 4, 2, 4),
        (129, 24, 2, 10),
        (3, 8, 2, 2),
        (2, 1, 2, 2),
        (7, 2, 2, 6),
        (40, 8, 4, 20),
        (2000, 1, 2, 768),
    ],
)
def test_frame_indices(length: int, fps: float, rate: float, count: int) -> None:
    chosen = frame_indices(length, fps, rate)
    assert (len(chosen), chosen[0], chosen[-1]) == (count, 0, length - 1)
    for i, one in enumerate(chosen):
        assert 2 * abs(one * (count - 1) - i * (length - 1)) <= count - 1  # the nearest to i (length - 1) / (count - 1)


def test_frame_sizes_are_those_of_transformers() -> None:
    for height in range(30, 1100, 35):
        for width in range(32, 1100, 45):
            expected = smart_resize(height, width, factor=28, min_pixels=128 * 28 * 28, max_pixels=200704)
            assert frame_size(height, width, 28, 200704) == expected
    assert frame_size(480, 832, 28, 200704) == (336, 588)


def test_the_question_is_the_published_text() -> None:
    digest = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
    assert hashlib.sha256(QUESTION.encode()).hexdigest() == digest


def test_published_scales_where_the_file_has_none(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert read_config(tmp_path).mean.tolist() == [1.0, -1.0, 0.25]
    whole = json.loads((tmp_path / "model_config.json").read_text())
    del whole["inference_config"]
    (tmp_path / "model_config.json").write_text(json.dumps(whole))
    config = read_config(tmp_path)
    assert_as_printed(config.mean[0], "3.6757")
    assert_as_printed(config.std[1], "1.3811")
    assert_as_printed(config.mean[2], "2.8105")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (videos("x", fps=None), "fps: got None"),
        (videos("x", fps=0.0), r"fps: got 0\.0"),
        (videos("x", length=1), "frames: got 1 per sample, want a video"),
        (videos("a <|video_pad|>"), "prompts: got 'a <|video_pad|>'"),
        (videos("a <|TA_reward|>"), "prompts: got 'a <|TA_reward|>'"),
        (replace(videos("x"), frames=videos("x").frames * 2), r"want \[0, 1\]"),
        (replace(videos("x"), prompts=["x", "y"]), "prompts: got 2, want 1"),
    ],
)
def test_bad_inputs(base: Path, checkpoint: Path, inputs: RewardInput, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        VideoQuality(str(checkpoint), str(base), dtype="float32")(inputs)


@pytest.mark.parametrize(("args", "message"), [({"batch": 0}, "batch: got 0"), ({"dtype": "int8"}, "dtype: got")])
def test_bad_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextAlignment("nowhere", "nowhere", **args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_template_type": "detailed"}, "prompt_template_type = 'detailed'"),
        ({"output_dim": 3}, "output_dim = 3"),
        ({"use_special_tokens": False}, "use_special_tokens = False"),
        ({"num_frames": 8}, "num_frames = 8"),
        ({"sample_type": "multi_pts"}, "sample_type"),
    ],
)
def test_other_kinds_of_model(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_config(tmp_path, **change)
    with pytest.raises(ValueError, match=f"path: got {message}"):
        read_config(tmp_path)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if name in key]:
            del weights[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("rm_head"), "lacks rm_head.weight"),
        (drop("layers.1.mlp.up_proj"), "lacks language_model.layers.1.mlp.up_proj.weight"),
        (drop("layers.0.self_attn.q_proj.lora_B"), "half a LoRA of language_model.layers.0.self_attn.q_proj.weight"),
        (lambda weights: weights.update({"model.layers.9.weight": torch.ones(1)}), "unknown language_model.layers.9"),
        (lambda weights: weights.update({"rm_head.weight": torch.ones(3, 32)}), r"rm_head.weight of shape \(3, 32\)"),
    ],
)
def test_checkpoints_that_do_not_fit(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    write_checkpoint(tmp_path, trained_model(base), "full-old")
    file = tmp_path / "checkpoint-20" / "model.pth"
    weights = torch.load(file)
    weights["rm_head.weight"] = weights.pop("base_model.model.rm_head.weight")
    change(weights)
    torch.save(weights, file)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, base)


def test_an_adapter_needs_the_embeddings_of_its_tokens(base: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, trained_model(base), "adapter")
    file = tmp_path / "checkpoint-20" / "non_lora_state_dict.pth"
    torch.save({name: tensor for name, tensor in torch.load(file).items() if "embed" not in name}, file)
    with pytest.raises(ValueError, match=r"lacks language_model\.embed_tokens\.weight"):
        load(tmp_path, base)


def test_empty_folders(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"want a folder with model_config\.json"):
        load(tmp_path, base)
    write_config(tmp_path)
    with pytest.raises(ValueError, match=r"want model\.pth, or adapter_model\.safetensors"):
        load(tmp_path, base)
