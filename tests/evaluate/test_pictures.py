"""The files of samples: every frame, without loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from dancegrpo_fast.evaluate.scores import save_sample


@pytest.mark.parametrize("order", ["aaaaa", "aabbba", "abcab", "a"])
def test_every_frame_is_in_the_file(order: str, tmp_path: Path) -> None:
    """Equal neighbours too, each for its own time."""
    known = torch.randint(0, 256, (3, 3, 6, 4), generator=torch.Generator().manual_seed(0))
    # Frames that differ in one pixel, where a writer stores a part.
    known[1] = known[0]
    known[1, :, 2, 2] = 255 - known[0, :, 2, 2]
    levels = known[["abc".index(letter) for letter in order]]
    with Image.open(save_sample(levels / 255, tmp_path / "a.png", 25.0)) as file:
        found = [(np.asarray(frame), frame.info.get("duration")) for frame in ImageSequence.Iterator(file)]
    assert torch.equal(torch.from_numpy(np.stack([frame for frame, _ in found])).long(), levels.permute(0, 2, 3, 1))
    assert {time for _, time in found} == ({40.0} if len(order) > 1 else {None})
