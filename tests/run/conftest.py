"""A finished run, to be continued or damaged."""

import shutil
from pathlib import Path

import pytest

from dancegrpo_fast.train.loop import Trainer

from ..train.tiny import make_recipe


@pytest.fixture(scope="session")
def once(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    Trainer(make_recipe(flux, run, keep_checkpoints=3)).run()
    return run


@pytest.fixture
def finished(once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(once, tmp_path / "run")
