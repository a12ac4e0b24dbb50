"""Plans of published models at real sizes against figures of another counter (`bench.memory.earlier`)."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from bench.memory.earlier import FIGURES, FLUX, VIDEO, Figure, denoiser, pieces, replay
from dancegrpo_fast.memory.planning.settings import GIB

from ..release import release_but
from ..tolerances import PUBLISHED

pytestmark = pytest.mark.usefixtures("collected_once")

# The others' traces take minutes.
QUICK = [f for f in FIGURES if f.subject == "FLUX.1-dev 720 x 720, all weights" and f.what.startswith("full")]


@pytest.mark.parametrize(
    "figure", release_but(QUICK, FIGURES), ids=[f"{figure.subject}: {figure.what}" for figure in FIGURES]
)
def test_the_planner_agrees_where_no_reason_is_given(figure: Figure) -> None:
    agrees = figure.answer() == pytest.approx(figure.number, rel=PUBLISHED, abs=figure.rounding)
    assert agrees != bool(figure.why)


def test_every_figure_is_there_once() -> None:
    names = [(figure.subject, figure.what) for figure in FIGURES]
    assert len(set(names)) == len(names)


@pytest.mark.release
def test_what_autocast_makes_of_float32_masters_explains_the_difference() -> None:
    """The published 224 has every weight's bf16 copy in it, which our checkpointing drops after each block.

    The published 432 keeps q, k and v of 60 blocks in float32; CUDA's autocast hands attention bf16 ones.
    """
    given = {**VIDEO, "dtype": "float32", "mixed_precision": "bf16"}
    forward, _ = replay(pieces({**given, "checkpointing": "full"}))
    dropped = forward.budget["master weights"] / 2 - forward.budget["parameters"]
    assert (denoiser(forward) + dropped) / GIB == pytest.approx(224, rel=PUBLISHED)
    tokens, width, blocks = 14 * 30 * 40 + 256, 3072, 60
    halved = 3 * 2 * tokens * width * blocks
    bare = denoiser(*replay(pieces({**given, "checkpointing": "none"})))
    assert (bare + halved) / GIB == pytest.approx(432, rel=PUBLISHED)
    rollout = pieces(given).rollout().budget
    assert rollout["parameters"] == pytest.approx(rollout["master weights"] / 2, rel=PUBLISHED)


@pytest.mark.release
def test_float32_lora_layers_keep_float32_inputs() -> None:
    """As peft's `get_peft_model` makes them; the published figures are for bf16 layers."""
    found = [
        pieces({**FLUX, "checkpointing": "none", "lora": 32, "lora_dtype": name}) for name in ("bfloat16", "float32")
    ]
    kept = [one.pick().blocks.saved() for one in found]
    assert kept[1]["cast"] > kept[0]["cast"]
    assert sum(kept[1].values()) > sum(kept[0].values())


def test_foreach_takes_a_copy_of_the_weights() -> None:
    step = pieces({**FLUX, "checkpointing": "full", "optimizer": "adamw_foreach"}).step()
    assert step.budget["temporaries"] == pytest.approx(step.budget["parameters"], rel=PUBLISHED)
