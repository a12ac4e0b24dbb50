"""The aesthetic predictor: its layers in closed form on embeddings from transformers."""

from pathlib import Path

import pytest
import torch

from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.rewards import RewardSet
from dancegrpo_fast.rewards.aesthetic import Aesthetic

from ..tolerances import assert_within_budget
from .tiny_clip import SIZES, aesthetic_layers, affine_map, as_pil, make_inputs, pillow_processor


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(aesthetic_layers(), path)
    return path


def ratings(clip: Path, frames: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, T] in `dtype`: the five layers are one affine map."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip).to(dtype).eval()
    processor = pillow_processor(model.config.vision_config.image_size)
    pixels = processor([as_pil(frame) for frame in frames.flatten(0, 1)], return_tensors="pt")["pixel_values"]
    words = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        embeds = model(pixel_values=pixels.to(dtype), input_ids=words).image_embeds
    matrix, offset = affine_map(aesthetic_layers(), dtype)
    return (embeds @ matrix.T + offset).reshape(frames.shape[:2])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_ratings(clip: Path, head: Path, height: int, width: int) -> None:
    inputs = make_inputs(6, length=2, height=height, width=width)
    truth, plain = (ratings(clip, inputs.frames, dtype).mean(1) for dtype in (torch.float64, torch.float32))
    found = RewardSet([RewardSettings("aesthetic", args={"path": str(clip), "head": str(head)})])(inputs)[0]
    assert_within_budget(found, truth, plain)
    assert len(set(found.tolist())) == len(found)


def test_the_prompt_does_not_matter(clip: Path, head: Path) -> None:
    reward = Aesthetic(clip, head)
    assert torch.equal(reward(make_inputs()), reward(make_inputs(prompts=["x"] * 4)))
    assert not hasattr(reward.towers._model, "text_model")


def test_hub_name(clip: Path, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or str(head))
    assert torch.equal(Aesthetic(clip)(make_inputs()), Aesthetic(clip, head)(make_inputs()))
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")]


def test_moving_takes_the_layers_along(clip: Path, head: Path) -> None:
    reward = Aesthetic(clip, head, dtype="bfloat16").to("meta")
    weights = [*reward.head.parameters(), *reward.towers._model.parameters()]
    assert {weight.device.type for weight in weights} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.weight": torch.zeros(1024, 768)}, "size mismatch for layers.0.weight"),
        ({"layers.8.weight": torch.zeros(1)}, "layers.8.weight"),
    ],
)
def test_layers_that_do_not_fit(clip: Path, tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    torch.save(aesthetic_layers() | change, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=rf"(?s)head: got .*{message}"):
        Aesthetic(clip, tmp_path / "head.pth")
