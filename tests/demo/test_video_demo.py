"""Moving digits: the data, closed forms of the motion rewards, both bases by the script that ships, and the recipes."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dancegrpo_fast.demo import bases, fitting, video
from dancegrpo_fast.demo.rewards import motion
from dancegrpo_fast.recipe import load_recipe
from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.run.pictures import draw
from dancegrpo_fast.run.sheets import read_samples
from dancegrpo_fast.run.words import read_rows
from dancegrpo_fast.train.loop import Trainer

from ..release import release_but
from ..tolerances import assert_same_formula

ROOT = Path(__file__).parents[2]


def dots(*tracks: list[tuple[int, int]]) -> Tensor:
    """Clips of one white pixel at the given places (x, y)."""
    frames = torch.zeros(len(tracks), len(tracks[0]), 3, 12, 12)
    for clip, track in zip(frames, tracks, strict=True):
        for frame, (x, y) in zip(clip, track, strict=True):
            # Two pixels, so that a frame holds more ink than a blank one may.
            frame[:, y, x] = frame[:, y + 1, x] = 1.0
    return frames


def inputs(frames: Tensor, **columns: list[object]) -> RewardInput:
    meta = [{name: values[row] for name, values in columns.items()} for row in range(len(frames))]
    return RewardInput(frames, ["x"] * len(frames), torch.zeros(len(frames), dtype=torch.int64), meta)


def clips(course: str, shake: float) -> tuple[RewardInput, Tensor]:
    """Real clips, and their tracks."""
    made, digits, ways = video.make_clips(video.COURSES[course], 1.0, shake, seed=3)
    chosen = torch.arange(0, len(made), 9)
    names = list(video.DIRECTIONS)
    return inputs(
        made[chosen].transpose(1, 2),
        digit=digits[chosen].tolist(),
        direction=[names[way] for way in ways[chosen].tolist()],
    ), ways[chosen]


def test_known_tracks_have_known_scores() -> None:
    steady = [(2 + t, 5) for t in range(5)]
    still = [(5, 5)] * 5
    kinked = [(2, 5), (3, 5), (4, 5), (4, 6), (4, 7)]  # one turn: (-1, 1) in one of three places
    frames = dots(steady, steady, steady, still, kinked)
    track, seen = motion.centres(frames)
    assert bool(seen.all())
    assert_same_formula(track[0], torch.tensor([[2.0 + t, 5.5] for t in range(5)], dtype=torch.float64))
    assert_same_formula(motion.acceleration(track), torch.tensor([0, 0, 0, 0, math.sqrt(2) / 3], dtype=torch.float64))

    given = inputs(frames, direction=["right", "left", "down", "right", "right"])
    assert motion.MotionAlignment(8.0)(given).tolist() == [0.5, -0.5, 0.0, 0.0, 0.25]
    assert motion.MotionAlignment(2.0)(given).tolist() == [1.0, -1.0, 0.0, 0.0, 1.0]
    quality = motion.MotionQuality()(given)
    assert quality[:4].tolist() == [1.0] * 4
    assert quality[4] == torch.tensor(-2 * math.sqrt(2) / 3, dtype=torch.float64).exp().float()


def test_blank_frames_get_the_least_score() -> None:
    frames = dots([(2 + t, 5) for t in range(5)])
    frames[0, 2] = 0.04
    given = inputs(frames, direction=["right"], digit=[1])
    assert motion.centres(frames)[1].tolist() == [[True, True, False, True, True]]
    assert motion.MotionAlignment(4.0)(given).tolist() == [-1.0]
    assert motion.MotionQuality()(given).tolist() == [0.0]
    frames[:] = 0
    assert motion.MovingDigitJudge()(given).tolist() == [0.0]


def test_real_clips_score_as_they_were_made() -> None:
    smooth, ways = clips("text", 0.0)
    shaken, _ = clips("text", 1.5)
    travel = video.COURSES["text"].travel
    alignment, quality = motion.MotionAlignment(travel), motion.MotionQuality()
    assert float(alignment(smooth).min()) > 0.8
    assert float(quality(smooth).mean()) > 2 * float(quality(shaken).mean())
    assert float(motion.MovingDigitJudge()(smooth).mean()) > 0.9
    others = [{**row, "digit": (int(row["digit"]) + 1) % 10} for row in smooth.meta]
    assert float(motion.MovingDigitJudge()(dataclasses.replace(smooth, meta=others)).mean()) < 0.1
    generator = torch.Generator().manual_seed(0)
    course = video.COURSES["text"]
    places = video.tracks(ways, course, torch.zeros(len(ways)), generator)
    along = torch.tensor(list(video.DIRECTIONS.values()))[ways]
    torch.testing.assert_close(places[:, -1] - places[:, 0], course.travel * along)


def test_first_frames_are_of_unseen_digits_and_do_not_tell_the_direction() -> None:
    split = video.split_digits()
    parts = [{tuple(row.tolist()) for row in split[name][0].flatten(1)} for name in ("base", "train", "test")]
    assert list(map(len, parts)) == [820, 40, 40] and len(set.union(*parts)) == 900
    assert all(split[name][1].bincount().tolist() == [4] * 10 for name in ("train", "test"))
    generator = torch.Generator().manual_seed(0)
    ways = torch.arange(4).repeat(2000)
    places = video.tracks(ways, video.COURSES["image"], torch.zeros(len(ways)), generator)[:, 0]
    low, high = places.amin(dim=0), places.amax(dim=0)
    for way in range(4):
        mine = places[ways == way]
        for edge, wanted in ((mine.amin(dim=0), low), (mine.amax(dim=0), high)):
            assert float((edge - wanted).abs().max()) < 0.01


def test_reward_inputs_are_checked(tmp_path: Path) -> None:
    frames = dots([(2, 5)] * 3)
    with pytest.raises(ValueError, match=r'meta\[0\]\["direction"\]: got None'):
        motion.MotionAlignment(4.0)(inputs(frames, digit=[1]))
    with pytest.raises(ValueError, match="travel: got 0"):
        motion.MotionAlignment(0)
    with pytest.raises(ValueError, match="T at least 3"):
        motion.MotionQuality()(inputs(frames[:, :2], digit=[1]))
    with pytest.raises(ValueError, match="one per sample"):
        motion.MotionQuality()(RewardInput(frames, ["x"], torch.zeros(1, dtype=torch.int64), []))
    with pytest.raises(ValueError, match="path: got"):
        motion.MovingDigit(tmp_path / "none")
    with pytest.raises(ValueError, match=r'meta\[0\]\["image"\]: got None'):
        motion.FirstFrame()(inputs(frames, digit=[1]))


def test_first_frame_counts_what_is_kept(tmp_path: Path) -> None:
    frames = dots([(2, 5)] * 3, [(9, 5)] * 3, [(2, 6)] * 3)
    Image.fromarray((frames[0, 0] * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    # The same, nothing in place, and one of two pixels in place.
    assert motion.FirstFrame()(inputs(frames, image=[str(tmp_path / "a.png")] * 3)).tolist() == [1.0, -1.0, 0.0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both bases by the script itself, with few steps (quality is what the recipes show), and the prompt files."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        fit, make = fitting.fit, video.make_clips
        patch.setattr(
            fitting, "fit", lambda label, parameters, loss, steps, rate: fit(label, parameters, loss, 2, rate)
        )
        patch.setattr(video, "make_clips", lambda *given: tuple(part[::10] for part in make(*given)))
        for base in ("video", "video_i2v"):
            patch.setitem(bases.BASES, base, dataclasses.replace(bases.BASES[base], batch=4))
            target = folder / "runs" / "bases" / base
            assert bases.build(base, target)
            assert not bases.build(base, target)
            assert sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) < 4e6
    video.write_prompts(folder / "recipes" / "prompts")
    return folder


def test_motion_alone_is_the_same_run_with_one_reward() -> None:
    whole, alone = (load_recipe([str(ROOT / "recipes" / f"video_motion{end}.yaml")])[0] for end in ("", "_only"))
    assert [reward.name for reward in alone.rewards] == ["motion_quality"]
    assert (alone.model, alone.sampler, alone.evaluation) == (whole.model, whole.sampler, whole.evaluation)
    iterations = dataclasses.replace(alone.train, iterations=whole.train.iterations)
    assert iterations == whole.train


@pytest.mark.parametrize("name", release_but(("i2v_motion",), ["video_motion", "i2v_motion"]))
def test_recipes_run_on_their_bases(
    name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    recipe, _ = load_recipe([str(ROOT / "recipes" / f"{name}.yaml")])
    assert recipe.evaluation is not None
    train = dataclasses.replace(recipe.train, iterations=1, prompts_per_iteration=2, group_size=3, micro_batch=3)
    evaluation = dataclasses.replace(recipe.evaluation, samples_per_prompt=2, grid_samples=2, grid_prompts=2)
    small = dataclasses.replace(recipe, train=train, evaluation=evaluation, output_dir=str(tmp_path / "run"), threads=1)
    trainer = Trainer(small)
    assert trainer.evaluator is not None
    # Two of the prompts: what is tested is that they run.
    trainer.evaluator.prompts = trainer.evaluator.prompts[:2]
    trainer.run()
    root = trainer.directory.root
    assert read_rows(root / "metrics.jsonl")[0]["ratio_first_update_max_dev"] == 0.0
    for row in read_rows(root / "evaluations.jsonl"):
        assert row.keys() >= {*trainer.evaluator.rewards.names, "motion_alignment", "moving_digit_judge"}

    (strips, moving, _), _ = draw(root)
    with Image.open(strips) as file:
        assert len(set(file.convert("L").get_flattened_data())) > 2
    with Image.open(moving) as file:
        assert file.n_frames == recipe.sampler.frames
    samples = read_samples(root / "samples" / "000001-ode.png")
    assert samples.cells.shape == (2, 2, 9, 12, 12, 3)
    assert samples.prompts == [prompt.text for prompt in trainer.evaluator.prompts]
