"""Every example runs and shows what it says."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dancegrpo_fast.cli import main
from dancegrpo_fast.memory.trace.tracer import collected
from dancegrpo_fast.prompts import load_prompts

from ..processes import LIMIT
from ..train.tiny import make_flux

pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What an example prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_grpo_from_scratch_learns(shown: Callable[..., str]) -> None:
    rewards = [float(found) for found in re.findall(r"reward (\S+)", shown("grpo_from_scratch.py", "--iterations=8"))]
    assert len(rewards) == 8
    assert min(rewards[-2:]) > max(rewards[:2])


def test_accelerate_changes_no_bit_and_keeps_less(shown: Callable[..., str]) -> None:
    said = shown("accelerate_a_transformer.py")
    assert "gradients: the same bits" in said
    before, after = map(float, re.findall(r"([\d.]+) MiB", said))
    assert after < before


@pytest.mark.release
def test_will_it_fit(shown: Callable[..., str]) -> None:
    with collected():
        said = shown("will_it_fit.py", "--model=sd14", "--gpu=8")
    gib = [float(found) for found in re.findall(r"([\d.]+) GiB with margins", said)]
    fits = [line.endswith(": fits 8 GiB") for line in said.splitlines()]
    assert len(gib) == 4 and gib[0] > gib[1] and gib[0] > gib[2] > gib[3]
    assert fits == [size <= 8 for size in gib]


@pytest.mark.release
def test_an_existing_script(shown: Callable[..., str], tmp_path: Path) -> None:
    script, report = FOLDER / "existing_script" / "train_grpo_flux.py", tmp_path / "report.json"
    alone = shown("existing_script/train_grpo_flux.py", "--iterations=1")
    command = (sys.executable, "-m", "dancegrpo_fast.cli", "run", "--latents=bfloat16", f"--report={report}")
    ran = subprocess.run(
        [*command, script, "--iterations=1"], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=LIMIT
    )
    offs = [float(re.findall(r"off by (\S+)", said)[0]) for said in (alone, ran.stdout)]
    assert offs[0] > 0 and offs[1] == 0
    (function,) = json.loads(report.read_text())["functions"]
    assert function["by"] == ["dancegrpo_fast.compat.dancegrpo.flux_step"]


class Terminal(io.StringIO):
    """A person looks at it."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_own_reward(stream: type[io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal bars show what an iteration is at; in a file there are none."""
    pytest.importorskip("jsonargparse")
    prompts = ROOT / "recipes" / "prompts" / "digits.jsonl"
    base = make_flux(tmp_path / "base", [prompt.text for prompt in load_prompts(prompts)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = ["train", str(FOLDER / "own_reward" / "recipe.yaml"), "--model.path", str(base), "--prompts", str(prompts)]
    given += ["--train.iterations=1", "--train.group_size=2", "--train.micro_batch=10", "--evaluation=null"]
    with contextlib.redirect_stderr(stream()) as err:
        assert main([*given, "--threads=1"]) == 0
    bars = [f"{what}:   0%" in err.getvalue() for what in ("sampling", "rewards", "updates")]
    assert bars == [stream is Terminal] * 3
    (row,) = map(json.loads, (tmp_path / "runs" / "own_reward" / "metrics.jsonl").read_text().splitlines())
    assert -0.9 < row["reward/Ink"] < 0


def test_the_table_names_every_example() -> None:
    found = re.findall(r"\]\(([^/)]+)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    there = {path.name for path in FOLDER.iterdir()} - {"README.md", "__pycache__"}
    assert sorted(found) == sorted(there)
