from pathlib import Path

import pytest


@pytest.fixture(params=["flux", "diffusion"])
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder
