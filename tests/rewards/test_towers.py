"""All rewards on CLIP alike: towers of low precision, and samples alone and among others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.rewards.aesthetic import Aesthetic
from dancegrpo_fast.rewards.clip_score import ClipScore
from dancegrpo_fast.rewards.hps import Hps
from dancegrpo_fast.rewards.pickscore import PickScore

from ..release import release_but
from ..tolerances import assert_same_cosines
from .tiny_clip import aesthetic_layers, affine_map, make_inputs

# How far a score moves for a cosine.
SCALES = {
    "clip_score": 1.0,
    "hps": 1.0,
    "pickscore": 100.0,
    "aesthetic": float(affine_map(aesthetic_layers(), torch.float64)[0].norm()),
}
Build = Callable[..., Any]
names = pytest.mark.parametrize("name", SCALES)


@pytest.fixture(scope="module")
def build(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    head = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(aesthetic_layers(), head)

    def made(name: str, **settings: Any) -> Any:
        if name == "aesthetic":
            return Aesthetic(clip, head, **settings)
        return {"clip_score": ClipScore, "hps": Hps, "pickscore": PickScore}[name](clip, tokenizer=clip, **settings)

    return made


@names
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision(build: Build, name: str, dtype: str) -> None:
    inputs = make_inputs(8)
    low, full = build(name, dtype=dtype), build(name)(inputs).double()
    assert {p.dtype for p in low.towers._model.parameters()} == {getattr(torch, dtype)}
    assert_same_cosines(low(inputs), full, getattr(torch, dtype), SCALES[name])
    # A group's order is that of its scores, which lie further apart than that.
    assert 0 < float((low(inputs) - full).abs().max()) < float(full.std())


def one(inputs: RewardInput, i: int) -> RewardInput:
    return replace(inputs, frames=inputs.frames[i : i + 1], prompts=inputs.prompts[i : i + 1])


@names
@pytest.mark.parametrize("batch", release_but((3,), [1, 3, 100]))
def test_a_sample_alone_and_among_others(build: Build, name: str, batch: int) -> None:
    inputs = make_inputs(4, length=2)
    # Each by a reward of its own, which remembers no other prompt.
    alone = torch.cat([build(name)(one(inputs, i)) for i in range(4)])
    size = SCALES[name] + float(alone.abs().max())
    assert_same_cosines(build(name, batch=batch)(inputs), alone.double(), torch.float32, size)
    assert len(set(alone.tolist())) == len(alone)
