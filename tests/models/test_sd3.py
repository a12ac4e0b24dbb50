"""Stable Diffusion 3 and 3.5 against their pipeline, and in training."""

from pathlib import Path
from typing import Any

import pytest

from . import checks_more as checks
from .folders_more import save_sd3

SD3: dict[str, Any] = {"family": "sd3"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "base")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_ode_is_the_pipeline(base: Path, tmp_path: Path, guidance: float) -> None:
    call = {"guidance_scale": guidance, "negative_prompt": ["blurry"] * 2}
    checks.check_sample(base, tmp_path, call, guidance_scale=guidance, negative_prompt="blurry", **SD3)


def test_a_shift_that_depends_on_the_size_is_the_pipelines(tmp_path: Path) -> None:
    base = save_sd3(tmp_path / "base", use_dynamic_shifting=True)
    checks.check_sample(base, tmp_path, {"guidance_scale": 1.0}, **SD3)


def test_training_has_ratio_one(base: Path, tmp_path: Path) -> None:
    checks.check_training(base, tmp_path, guidance_scale=3.0, **SD3)


def test_resume_and_policies_change_no_bit(base: Path, tmp_path: Path) -> None:
    checks.check_resume_and_policies(base, tmp_path, guidance_scale=3.0, **SD3)


def test_lora_comes_back(base: Path, tmp_path: Path) -> None:
    checks.check_lora_round_trip(base, tmp_path / "run", **SD3)
