"""The embedded data, its rewards, and a base built by the script that ships."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.demo import bases, data, fitting, video
from dancegrpo_fast.demo.rewards.digits import DigitJudge, DigitProbability
from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.rewards.ocr import OcrExact, OcrReward, edit_distance, quoted_text
from dancegrpo_fast.train.loop import Trainer

from ..release import release_but
from ..train.tiny import EvaluationSettings, make_recipe, reward

PROMPTS = Path(__file__).parents[2] / "recipes" / "prompts"


def inputs(images: torch.Tensor, prompts: list[str], **columns: list[int]) -> RewardInput:
    meta = [{name: values[row] for name, values in columns.items()} for row in range(len(prompts))]
    return RewardInput(images[:, None], prompts, torch.zeros(len(prompts), dtype=torch.int64), meta)


def test_splits_share_nothing() -> None:
    images = {name: data.load_digits(name)[0].flatten(1) for name in data.SPLIT_SIZES}
    seen = [{tuple(row.tolist()) for row in rows} for rows in images.values()]
    assert [len(rows) for rows in images.values()] == [900, 450, 447]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_wrong_captions_and_signs() -> None:
    labels = data.load_digits("generator")[1]
    shuffled = data.shuffle_labels(labels, 0.5, seed=1)
    assert 0.4 < float((shuffled != labels).float().mean()) < 0.5
    assert sorted(shuffled.tolist()) == sorted(labels.tolist())
    train, held_out = data.sign_numbers()
    assert len(train) == 80 and len(held_out) == 20 and not set(train) & set(held_out)
    with pytest.raises(ValueError, match="share"):
        data.shuffle_labels(labels, 1.5, seed=1)
    with pytest.raises(ValueError, match="split"):
        data.load_digits("test")


@pytest.mark.parametrize("module", [data, video])
def test_committed_prompts_are_the_scripts(tmp_path: Path, module: Any) -> None:
    for path in module.write_prompts(tmp_path):
        assert path.read_bytes() == (PROMPTS / path.name).read_bytes()


def test_judge_reads_digits_it_was_not_trained_on() -> None:
    images, labels = data.load_digits("generator")
    right = DigitJudge()(inputs(images, ["x"] * len(images), digit=labels.tolist()))
    assert float(right.mean()) > 0.9
    wrong = DigitJudge()(inputs(images, ["x"] * len(images), digit=((labels + 1) % 10).tolist()))
    assert float(wrong.mean()) < 0.05


def test_ocr_reads_real_signs() -> None:
    images, labels = data.load_digits("judge")
    signs, numbers = data.make_signs(images, labels, range(100), 60, seed=3)
    prompts = [data.sign_prompt(number) for number in numbers.tolist()]
    options = {"invert": True, "upscale": 3, "detect": False}
    exact = OcrExact(**options)(inputs(signs, prompts))
    close = OcrReward(**options)(inputs(signs, prompts))
    assert float(exact.mean()) > 0.5
    assert bool((close >= exact).all())
    others = [data.sign_prompt((number + 37) % 100) for number in numbers.tolist()]
    assert float(OcrExact(**options)(inputs(signs, others)).mean()) < 0.05


def test_reward_inputs_are_checked(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r'meta\[0\]\["digit"\]: got None'):
        DigitJudge()(inputs(images, ["a", "b"]))
    with pytest.raises(ValueError, match="frames"):
        DigitJudge()(inputs(torch.zeros(2, 3, 8, 8), ["a", "b"], digit=[1, 2]))
    with pytest.raises(ValueError, match="path"):
        DigitProbability(tmp_path / "none")
    with pytest.raises(ValueError, match="one text in double quotes"):
        quoted_text("no text")
    with pytest.raises(ValueError, match="upscale"):
        OcrReward(upscale=0)


@pytest.mark.parametrize(
    ("one", "other", "distance"), [("", "", 0), ("12", "", 2), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


@pytest.mark.parametrize("name", release_but(("digits_ddim",), ["digits", "digits_ddim", "signs"]))
def test_a_base_is_a_model_the_trainer_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The script itself, with few steps: quality is what the recipes show.
    monkeypatch.setitem(bases.BASES, name, dataclasses.replace(bases.BASES[name], steps=3))
    fit = fitting.fit
    monkeypatch.setattr(
        fitting, "fit", lambda label, parameters, loss, steps, rate: fit(label, parameters, loss, 3, rate)
    )
    folder = tmp_path / name
    assert bases.build(name, folder)
    assert not bases.build(name, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 3e6

    content = "signs.test" if name == "signs" else "digits"
    judged = EvaluationSettings(samples_per_prompt=3, grid_samples=2, grid_prompts=4, rewards=[reward("Brightness")])
    given = {"prompts": str(PROMPTS / f"{content}.jsonl"), "width": 32 if name == "signs" else 16}
    Trainer(make_recipe(folder, tmp_path / "run", iterations=1, evaluation=judged, **given)).run()

    from PIL import Image

    from dancegrpo_fast.run.pictures import draw
    from dancegrpo_fast.run.words import closing_line

    for picture in draw(tmp_path / "run")[0]:
        pixels = torch.tensor(list(Image.open(picture).convert("L").get_flattened_data()))
        assert pixels.float().std() > 5
    assert "ratio_first_update_max_dev 0, 1 iterations" in closing_line(tmp_path / "run", name)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks vae/config\.json"):
        bases.build(name, folder)
