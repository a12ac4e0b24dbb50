"""Plans of GPUs that share a sample's tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.blocks import compose
from dancegrpo_fast.memory.planning.calls import _traced
from dancegrpo_fast.memory.planning.cards import Rates
from dancegrpo_fast.memory.planning.cases import kinds_of, resolved
from dancegrpo_fast.memory.planning.planner import Plan, plan
from dancegrpo_fast.memory.planning.quantised import quantised
from dancegrpo_fast.memory.planning.sequences import exchanged, told
from dancegrpo_fast.memory.planning.settings import Settings

from ..release import release_but
from ..tolerances import COMPOSED
from .pipelines import write
from .small import case_of

attention_dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

pytestmark = pytest.mark.usefixtures("collected_once")

FLUX: dict[str, Any] = {"model": "flux-dev", "height": 512, "width": 512, "fsdp": 4, "strategy": "none", "lora": 16}
FLUX |= {"checkpointing": "full", "text_encoders": "precomputed", "attention": "flash"}


@pytest.mark.parametrize("which", release_but(("wan21-1.3b ring",), ["flux-dev ulysses", "wan21-1.3b ring"]))
def test_few_blocks_say_what_all_do(which: str, tmp_path: Path) -> None:
    """Of the real width, in eight of its layers."""
    model, kind = which.split()
    config = json.loads((specs.CONFIGS / f"{model}.json").read_text())["denoiser"]
    folder = write(tmp_path, None, transformer=config | {"num_layers": 8})
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    case = replace(case_of(folder, 512, frames=5 if "wan" in model else 1), sequence_parallel=4, sequence_kind=kind)
    blocks = compose(case, "full")
    whole = _traced(case, "full", tuple(one.blocks for one in kinds_of(resolved(case.spec))))
    for phase in ("forward", "backward"):
        assert sum(blocks.peak(phase).bytes.values()) == pytest.approx(whole.peak_of(phase).bytes, rel=COMPOSED)
        flops = sum(whole.flops_by_group[phase].values())
        assert sum(blocks.flops(phase).values()) == pytest.approx(flops, rel=COMPOSED)
    # A ring has its own backend, and no model after it.
    assert attention_dispatch._AttentionBackendRegistry._active_backend == active


@pytest.fixture(scope="module")
def plans() -> dict[int, Plan]:
    """Four samples on a process, and sixteen on four that share each; of hosts that are never behind."""
    given = FLUX | {"rates": Rates(launch_us=1e-3)}
    alone = plan(Settings(**given, group_size=4), advise=False)
    return {1: alone, 4: plan(Settings(**given, group_size=16, sequence_parallel=4), advise=False)}


def test_activations_are_split_and_weights_are_not(plans: dict[int, Plan]) -> None:
    one, four = ({phase.name: phase.budget for phase in plans[count].phases} for count in (1, 4))
    for name, split in four.items():
        assert split["parameters"] == one[name]["parameters"]
    # Vectors of times and texts are whole, which are small beside the tokens'.
    inputs = four["replay backward"]["block inputs"], one["replay backward"]["block inputs"] / 4
    assert inputs[0] == pytest.approx(inputs[1], rel=0.02)
    assert plans[4].peak.bytes < plans[1].peak.bytes


def test_an_iteration_takes_as_long_but_for_what_is_exchanged(plans: dict[int, Plan]) -> None:
    """The same work a GPU: a quarter of the tokens of four times the samples, whose modulation each computes whole."""
    one, four = ({phase.name: phase.seconds for phase in plans[count].phases} for count in (1, 4))
    assert four["decode"] == pytest.approx(one["decode"])
    assert one["rollout"] < four["rollout"] < 1.5 * one["rollout"]
    [reason] = [line for line in plans[4].reasons if line.startswith("sequence_parallel")]
    assert "a GPU has 256 of 1024 tokens and 128 of 512 of text" in reason


def test_what_is_exchanged() -> None:
    case = replace(case_of("flux-dev", 512), sequence_parallel=4)
    # 57 blocks, 3072 channels, 1536 tokens of both kinds in bf16; queries, keys, values, results; three of four parts.
    each = 57 * 3072 * 1536 // 4 * 2
    assert exchanged(case) == (3 * each, 3 * each)
    # Keys and values of three others; their gradients go round in float32.
    ring = replace(case, sequence_kind="ring")
    assert exchanged(ring) == (6 * each, 6 * each + 2 * 4 * 2 * each)
    assert exchanged(replace(case, sequence_parallel=1)) == (0, 0)
    # 512 more tokens of a picture to edit.
    assert exchanged(replace(case, reference=(256, 512))) == (4 * each, 4 * each)
    settings = Settings(**FLUX, sequence_parallel=4, reference_height=256, reference_width=512)
    [reason] = told(settings, replace(case, reference=(256, 512)))
    assert "a GPU has 384 of 1536 tokens" in reason


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_quantised_weights_are_those_of_one_gpu(kind: str) -> None:
    case = case_of("flux-dev", 512, lora=16)
    assert quantised(replace(case, sequence_parallel=4), kind) == quantised(case, kind)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sequence_parallel": 3}, "sequence_parallel: got 3 with fsdp 4, want a divisor of the GPUs"),
        ({"sequence_parallel": 0}, "sequence_parallel: got 0, want an integer of at least 1"),
        ({"sequence_kind": "stripes"}, 'sequence_kind: got "stripes", want one of ulysses, ring'),
        ({"sequence_parallel": 4, "text_tokens": 77}, "sequence_parallel: got 4 for 77 tokens of text"),
        ({"sequence_parallel": 4, "height": 720, "width": 720}, "sequence_parallel: got 4 for a sample of 1 x 720"),
        ({"sequence_parallel": 4, "model": "sd35-medium"}, "sequence_parallel: got 4 for a SD3Transformer2DModel"),
        ({"sequence_parallel": 4, "sequence_kind": "ring", "attention": "math"}, 'attention: got "math" with a ring'),
    ],
)
def test_what_cannot_be_split_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        plan(Settings(**FLUX | given), advise=False)
