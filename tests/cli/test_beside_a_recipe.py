"""A recipe is copied, and trained in the folder that it was copied to, with a reward that lies beside it."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from dancegrpo_fast.prompts import load_prompts

from ..processes import LIMIT
from ..train.tiny import make_flux

pytest.importorskip("diffusers")
pytest.importorskip("jsonargparse")

ROOT = Path(__file__).parents[2]
REWARD = """
from helper_of_the_reward import brightness


class Bright:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, inputs):
        return self.factor * brightness(inputs.frames)
"""
HELPER = """
def brightness(frames):
    return frames.mean(dim=(1, 2, 3, 4))
"""


def ran(folder: Path, *words: str | Path, quiet: bool = True) -> str:
    """What a command prints; nobody, this package or another, complains on the way."""
    done = subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert done.returncode == 0 and not (quiet and done.stderr), (done.stdout[-2000:], done.stderr[-3000:])
    return done.stdout


def fresh(folder: Path) -> Path:
    """The command of a new environment, which has the packages of this one and a wheel that is built as users do."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("--no-deps", "--config-settings=cmake.define.DGF_CUDA=OFF", "--wheel-dir", "wheels")
    ran(folder, *pip, "wheel", *build, ROOT, quiet=False)
    (wheel,) = (folder / "wheels").glob("*.whl")
    venv.create(folder / "new", symlinks=True)
    (packages,) = (folder / "new" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "new" / "bin" / "python"
    ran(folder, *pip, "--python", python, "install", "--no-deps", "--force-reinstall", wheel, quiet=False)
    command = folder / "new" / "bin" / "dancegrpo-fast"
    where = ran(folder, python, "-c", "import dancegrpo_fast; print(dancegrpo_fast.__file__)")
    assert Path(where.strip()).is_relative_to(packages)
    return command


@pytest.mark.parametrize("new", [False, pytest.param(True, marks=pytest.mark.release)], ids=["installed", "wheel"])
def test_a_copied_recipe_trains_with_a_reward_of_ones_own(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if new:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    command = fresh(tmp_path) if new else Path(sys.executable).with_name("dancegrpo-fast")
    work = tmp_path / "work"
    work.mkdir()
    assert "recipes/digits.yaml" in ran(work, command, "recipes", "copy", "digits")
    (work / "recipes" / "my_reward.py").write_text(REWARD)
    # The working folder is looked in, too.
    (work / "helper_of_the_reward.py").write_text(HELPER)
    prompts = [prompt.text for prompt in load_prompts(work / "recipes" / "prompts" / "digits.jsonl")]
    make_flux(work / "runs" / "bases" / "digits", prompts)
    small = ("--train.iterations", "2", "--train.group_size", "2", "--train.micro_batch", "10")
    small += ("--sampler.num_steps", "4", "--evaluation", "null", "--threads", "1")
    rewards = '[{name: "my_reward:Bright", args: {factor: 2.0}}]'
    said = ran(work, command, "train", "recipes/digits.yaml", *small, "--rewards", rewards)
    assert said.splitlines()[-1].startswith("digits: ") and "2 iterations" in said
    rows = [json.loads(line) for line in (work / "runs" / "digits" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(0 < row["reward/Bright"] < 2 and row["ratio_first_update_max_dev"] == 0 for row in rows)
