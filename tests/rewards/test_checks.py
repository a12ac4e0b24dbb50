"""Prompts that a reward cannot score are refused before anything is sampled, and the others are not."""

import sys
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.demo.rewards.motion import FirstFrame, MotionAlignment, MovingDigitJudge
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.rewards import Checking, RewardSet, build_reward
from dancegrpo_fast.rewards.geneval import GenEval
from dancegrpo_fast.rewards.hps import Hps
from dancegrpo_fast.rewards.videoalign import TextAlignment

from ..train.tiny import RewardSettings
from . import tiny_videoreward

CAT = {"class": "cat", "count": 1}


def refuses(scorer: Any, message: str, *rows: tuple[str, dict[str, Any]]) -> None:
    assert isinstance(scorer, Checking)
    texts, meta = [text for text, _ in rows], [columns for _, columns in rows]
    scorer.check(texts[:-1], meta[:-1])
    with pytest.raises(ValueError, match=message):
        scorer.check(texts, meta)


def test_ocr_wants_one_quoted_text() -> None:
    rewards = RewardSet([RewardSettings("ocr"), RewardSettings("digit_judge")])
    rewards.check([Prompt('a sign "7"', {"digit": 7})])
    with pytest.raises(ValueError, match=r"""rewards: "ocr" cannot score all prompts: prompts: got 'no sign'"""):
        rewards.check([Prompt('a sign "7"', {"digit": 7}), Prompt("no sign", {"digit": 7})])
    with pytest.raises(ValueError, match=r'rewards: "digit_judge" cannot .*meta\[1\]\["digit"\]: got None'):
        rewards.check([Prompt('a sign "7"', {"digit": 7}), Prompt('"8"', {})])


def test_rewards_of_clips_want_their_columns(tmp_path: Path) -> None:
    (picture := tmp_path / "x.png").touch()
    there, absent = {"image": str(picture)}, {"image": str(tmp_path / "y.png")}
    refuses(MotionAlignment(1.0), r'meta\[1\]\["direction"\]: got 9', ("", {"direction": "up"}), ("", {"direction": 9}))
    refuses(MovingDigitJudge(), r'meta\[1\]\["digit"\]: got True', ("", {"digit": 0}), ("", {"digit": True}))
    refuses(FirstFrame(), r'meta\[1\]\["image"\]: got .*y\.png', ("", there), ("", absent))


def test_hps_wants_what_it_can_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    refuses(Hps.__new__(Hps), "prompts: got 'café', want ftfy", ("cafe", {}), ("café", {}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"'x' with columns \[\], want GenEval's tag and include"),
        ({"tag": "counting", "include": []}, "want GenEval's tag and include"),
        ({"tag": "counting", "include": [{"class": "cat"}]}, "object .*'cat'.*, want its class and a count"),
        ({"tag": "counting", "include": [CAT | {"count": 0}]}, "a count of at least 1"),
        ({"tag": "counting", "include": [CAT | {"class": "yeti"}]}, 'class "yeti"'),
        ({"tag": "counting", "include": [CAT], "exclude": None}, "exclude None"),
        ({"tag": "counting", "include": [CAT], "exclude": [CAT | {"class": "yeti"}]}, 'class "yeti"'),
        ({"tag": "colors", "include": [CAT | {"color": "mauve"}]}, 'color "mauve"'),
        ({"tag": "position", "include": [CAT, CAT | {"position": ["beside", 0]}]}, r"position \['beside', 0\]"),
        ({"tag": "position", "include": [CAT, CAT | {"position": ["above", 1]}]}, r"position \['above', 1\]"),
        ({"tag": "position", "include": [CAT, CAT | {"position": "above"}]}, "position 'above'"),
    ],
)
def test_geneval_wants_its_columns(columns: dict[str, Any], message: str) -> None:
    scorer = GenEval.__new__(GenEval)
    scorer._names = {0: "cat"}
    right = {"tag": "position", "include": [CAT, CAT | {"color": "red", "position": ["left of", 0]}], "exclude": [CAT]}
    refuses(scorer, message, ("a", right), ("b", {"tag": "single_object", "include": [CAT]}), ("x", columns))


def test_videoalign_wants_no_token_of_its_question(tmp_path: Path) -> None:
    base = tiny_videoreward.make_base(tmp_path / "base")
    tiny_videoreward.write_config(tmp_path)
    tiny_videoreward.write_checkpoint(tmp_path, tiny_videoreward.trained_model(base), "full-old")
    scorer = TextAlignment(str(tmp_path), str(base), dtype="float32")
    for token in ("<|video_pad|>", "<|MQ_reward|>"):
        refuses(
            scorer, f"prompts: got .*{token}".replace("|", r"\|"), ("a <| b", {}), ("plain", {}), (f"a {token}", {})
        )


def test_videoalign_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_videoreward.write_config(tmp_path)
    for place, message in (
        ({"path": str(tmp_path / "none")}, r"path: got '.*none', want an existing file or folder, or a hub name"),
        ({"path": str(tmp_path), "base": str(tmp_path)}, f"base: got '{tmp_path}', which does not load"),
    ):
        with pytest.raises(ValueError, match=message):
            build_reward(RewardSettings("videoalign_mq", args=place))

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"path: got 'KwaiVGI/VideoReward', which does not load: no network"):
        build_reward(RewardSettings("videoalign_mq"))
