from collections.abc import Callable
from pathlib import Path

import pytest

from dancegrpo_fast.models.qwen_image_edit import PIPELINES

from .cases import EDIT_TOKENS
from .folders import BUILDERS


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, made when first asked for."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = BUILDERS[family](tmp_path_factory.mktemp(family) / "base")
        return made[family]

    return build


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Qwen-Image-Edit, whose pipelines encode a million pixels, here 32 x 64, and have fewer seen by the text."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as first
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    seen, encoded = 112 * 112, 48 * 48
    assert PIPELINES["QwenImageEditPlusPipeline"][0] == plus.CONDITION_IMAGE_SIZE
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", seen)
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", encoded)
    monkeypatch.setitem(PIPELINES, "QwenImageEditPlusPipeline", (seen, EDIT_TOKENS))
    # The first has one size for both, which its call says.
    sized = first.calculate_dimensions
    monkeypatch.setattr(first, "calculate_dimensions", lambda _, ratio: sized(encoded, ratio))
    monkeypatch.setitem(PIPELINES, "QwenImageEditPipeline", (encoded, EDIT_TOKENS))
