"""HPS v2.1: open_clip's layout, its letterbox and its cleaning of prompts."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.rewards import RewardSet
from dancegrpo_fast.rewards.hps import Hps, clean_prompt, model_from_open_clip
from dancegrpo_fast.rewards.pixels import letterbox_pixels

from ..tolerances import assert_same_cosines
from .open_clip_style import OpenClip
from .tiny_clip import CONTEXT, IMAGE_SIZE, make_inputs, save_tokenizer

FILE = "HPS_v2.1_compressed.pt"
PROMPTS = ("A red  bird", "two BLUE cats\n", "a cat &amp; a bird", "bird &amp;lt;cat&amp;gt;")
CLEANED = ("a red bird", "two blue cats", "a cat & a bird", "bird <cat>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def words(tokenizer: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)


@pytest.fixture(scope="module")
def published(words: Any) -> OpenClip:
    torch.manual_seed(3)
    return OpenClip(len(words)).eval()


@pytest.fixture(scope="module")
def checkpoint(published: OpenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hps") / FILE
    torch.save({"epoch": 1, "state_dict": published.state_dict()}, path)
    return path


@pytest.fixture
def fake_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolves references as ftfy does and mends one known word."""
    module = ModuleType("ftfy")
    module.fix_text = lambda text: text.replace("&amp;", "&").replace("cafÃ©", "café")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ftfy", module)


def cosines(model: OpenClip, words: Any, inputs: Any, texts: Any) -> torch.Tensor:
    """By the other implementation, in float64, tokens padded with 0 as open_clip pads."""
    ids = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        tokens = words(text)["input_ids"]
        row[: len(tokens)] = torch.tensor(tokens)
    pixels = letterbox_pixels((inputs.frames[:, 0] * 255).round().byte(), IMAGE_SIZE).double()
    with torch.no_grad():
        return model.double()(pixels, ids)


@pytest.mark.parametrize(("height", "width"), [(37, 45), (28, 28), (60, 20)])
def test_scores_are_those_of_open_clips_layout(
    published: OpenClip, checkpoint: Path, tokenizer: Path, words: Any, fake_ftfy: None, height: int, width: int
) -> None:
    inputs = make_inputs(height=height, width=width, prompts=PROMPTS)
    found = RewardSet([RewardSettings("hps", args={"path": str(checkpoint), "tokenizer": str(tokenizer)})])(inputs)
    wanted = cosines(published, words, inputs, CLEANED)
    assert_same_cosines(found[0], wanted, torch.float32)
    assert len(set(found[0].tolist())) == len(wanted)


def test_file_folder_hub_and_converted_model(
    checkpoint: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or str(checkpoint))
    inputs = make_inputs(prompts=["x"] * 4)
    wanted = Hps(checkpoint, tokenizer)(inputs).double()
    model_from_open_clip(torch.load(checkpoint, weights_only=True)["state_dict"]).save_pretrained(tmp_path)
    for path in (checkpoint.parent, tmp_path, "xswu/HPSv2"):
        assert_same_cosines(Hps(path, tokenizer)(inputs), wanted, torch.float32)
    assert asked == [("xswu/HPSv2", FILE)]


@pytest.mark.parametrize("text", ["é", "“quoted”", "a\x00b", "&eacute;", "a &amp; b", "\x1b[31mred"])
def test_what_needs_ftfy_says_so(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match="want ftfy to clean it"):
        clean_prompt(text)


def test_what_needs_no_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt("  A\tcat & a\r\n DOG, 4K!!  ") == "a cat & a dog, 4k!!"
    assert clean_prompt("&lt") == "<"


def test_ftfy_is_used_where_it_is(fake_ftfy: None) -> None:
    assert clean_prompt("A cafÃ©") == "a café"
    assert clean_prompt("&amp;amp;lt;") == "<"


class Payload:
    """What unpickling must never run."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_nothing_in_a_file_is_run(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"path: got .* does not load"):
        Hps(tmp_path / FILE, tokenizer)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_something_else(published: OpenClip, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"path: got .*want {FILE}"):
        Hps(tmp_path, tokenizer)
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"path: got .* does not load"):
        Hps(tmp_path, tokenizer)
    torch.save(published.state_dict(), tmp_path / FILE)
    with pytest.raises(ValueError, match="want a file with a state_dict"):
        Hps(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual.proj", None, "without 'visual.proj'"),
        ("transformer.resblocks.1.ln_2.bias", None, "1 weights do not fit .*text_model.encoder.layers.1.layer_norm2"),
        ("visual.extra.weight", torch.zeros(1), "1 weights do not fit .*visual.extra.weight"),
        ("visual.ln_pre.weight", torch.zeros(3), "1 weights do not fit .*vision_model.pre_layrnorm.weight"),
    ],
)
def test_state_dicts_that_do_not_fit(published: OpenClip, key: str, value: torch.Tensor | None, message: str) -> None:
    state = dict(published.float().state_dict())
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(ValueError, match=message):
        model_from_open_clip(state)
