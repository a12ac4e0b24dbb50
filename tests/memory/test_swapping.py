"""Blocks that swap, as the planner counts them: bytes of real runs on a CPU, seconds of the link, what `auto` takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from bench.memory.families import FAMILIES, RANK, prepare, real, real_inputs
from bench.memory.ledger import measure
from dancegrpo_fast.activations import checkpointing
from dancegrpo_fast.activations.streaming import BUFFERS, BlockSwap
from dancegrpo_fast.memory.planning.blocks import compose
from dancegrpo_fast.memory.planning.budget import Phase
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.planner import plan
from dancegrpo_fast.memory.planning.settings import GIB, Settings
from dancegrpo_fast.memory.planning.swapping import Swap
from dancegrpo_fast.quantization import store_in_fp8

from ..activations.test_streaming import storages
from ..release import release_but
from ..tolerances import PREDICTED_BYTES

pytestmark = pytest.mark.usefixtures("collected_once")

CPU, BF16 = torch.device("cpu"), torch.bfloat16
DEEP = {"num_layers": 3, "num_single_layers": 5, "num_attention_heads": 8, "attention_head_dim": 32}
DEEP |= {"axes_dims_rope": (8, 12, 12)}
FAMILY = next(family for family in FAMILIES if family.name == "FLUX")
# More in weights than in activations.
LARGE = replace(FAMILY, config=FAMILY.config | DEEP, height=96, width=96, rows=1)


def asked(folder: Path, **changes: Any) -> Settings:
    """LoRA on this family."""
    frames, height, width, rows, tokens = LARGE.sizes
    given: dict[str, Any] = {"text_tokens": tokens, "micro_batch": rows, "rollout_batch": rows, "lora": RANK}
    given |= {"text_encoders": "precomputed", "attention": "math"}
    return Settings(LARGE.spec(folder).name, frames, height, width, **given | changes)


def pieces(folder: Path, **changes: Any) -> Iteration:
    """The planner's, with a CPU's attention."""
    found = Iteration(asked(folder, **changes))
    found.replay = replace(found.replay, kernel="cpu")
    return found


def prepared(folder: Path, count: int, quantization: str, policy: str) -> tuple[nn.Module, list[Tensor]]:
    """The real model, and its weights in host memory."""
    model = prepare(real(LARGE.spec(folder), BF16), torch.float32, "off")
    if quantization == "fp8":
        store_in_fp8(model, BF16)
    swap = BlockSwap(model, count, CPU)
    checkpointing.apply(model, policy)
    return model, [streamed.host for streamed in swap.streamed]


def beside(phase: Phase) -> int:
    """Of a call, without what an iteration has beside it."""
    return sum(size for name, size in phase.budget.items() if name not in ("trajectories", "optimizer"))


RUNS = [(5, "full"), (5, "none"), (2, "full"), (2, "none")]


@pytest.mark.parametrize("case", release_but(RUNS[:1], RUNS), ids=str)
def test_bytes_are_those_of_a_real_run(tmp_path: Path, case: tuple[int, str]) -> None:
    count, policy = case
    planner = pieces(tmp_path, checkpointing=policy, blocks_to_swap=count)
    replay = max(map(beside, planner.training(compose(planner.replay, policy))))
    for train, planned in ((True, replay), (False, beside(planner.rollout()))):
        model, host = prepared(tmp_path, count, "none", policy)
        found = measure(model, real_inputs(LARGE.spec(tmp_path), LARGE.sizes, BF16), train=train, host=host)
        assert found.device_peak == pytest.approx(planned, rel=PREDICTED_BYTES)
        assert sum(each.nbytes for each in host) == sum(planner.rest.swap.host)
        # Without them the plan would be off by more.
        assert planner.rest.swap.saved > PREDICTED_BYTES * planned


@pytest.mark.parametrize("policy", release_but(("full",), ["none", "full"]))
def test_layerwise_casting_leaves_no_copies(tmp_path: Path, policy: str) -> None:
    planner = pieces(tmp_path, quantization="fp8", checkpointing=policy, blocks_to_swap=4)
    model, host = prepared(tmp_path, 4, "fp8", policy)
    model(**real_inputs(LARGE.spec(tmp_path), LARGE.sizes, BF16))[0].sum().backward()
    assert storages(model) == pytest.approx(planner.rest.weights["parameters"], rel=PREDICTED_BYTES)
    assert sum(each.nbytes for each in host) == sum(planner.rest.swap.host)


def test_seconds_of_the_link(tmp_path: Path) -> None:
    swap = Swap((1, 2, 4, 8), 9)
    assert (swap.buffer, swap.saved) == (8, 15 - BUFFERS * 8)
    assert (swap.rollout, swap.forward, swap.backward) == (15, 12, 3)
    assert Swap().saved == Swap().rollout == 0 and Swap().reasons() == []
    plain = asked(tmp_path, checkpointing="full")
    fast, slow = (plain.changed(rates=replace(plain.rates, pcie_gb_s=speed)) for speed in (1e9, 1e-6))
    assert plan(fast, advise=False, blocks_to_swap=3).seconds == plan(fast, advise=False).seconds
    found = plan(slow, advise=False, blocks_to_swap=3)
    moved = Iteration(found.settings).rest.swap
    calls, trained = 12 * plain.num_steps, 12 * 10
    wanted = calls * moved.rollout + trained * (moved.forward + moved.backward)
    assert found.seconds == pytest.approx(wanted / 1e3, rel=0.001)
    assert any(reason.startswith("blocks_to_swap 3: frozen weights of 5 of 8 blocks") for reason in found.reasons)


def test_auto_swaps_the_fewest_that_fit_or_more_where_that_is_faster(tmp_path: Path) -> None:
    settings = asked(tmp_path, checkpointing="full", blocks_to_swap="auto")
    most, whole = (plan(settings.changed(blocks_to_swap=count), advise=False).total_bytes for count in (6, 0))
    assert plan(settings.changed(gpu_gib=whole / GIB), advise=False).settings.blocks_to_swap == 0
    tight = settings.changed(gpu_gib=(most + whole) / 2 / GIB)
    found = plan(tight, advise=False)
    count = found.settings.blocks_to_swap
    assert isinstance(count, int) and 0 < count < 6 and found.fits(tight.gpu_gib)
    assert not plan(tight.changed(blocks_to_swap=count - 1), advise=False).fits(tight.gpu_gib)
    # On a fast link more blocks cost nothing, and leave memory to keep what is computed again otherwise.
    fast = tight.changed(checkpointing="auto", rates=replace(tight.rates, pcie_gb_s=1e9, launch_us=1e-6))
    more = plan(fast, advise=False)
    assert more.settings.blocks_to_swap > count and more.fits(tight.gpu_gib)
    assert more.seconds < found.seconds
    nothing = plan(settings.changed(gpu_gib=most / GIB - 0.001), advise=False)
    assert nothing.settings.blocks_to_swap == 6 and "it does not fit" in nothing.reasons[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": 0}, "blocks_to_swap: got 3 with full fine-tuning, want 0, or LoRA without shards"),
        ({"fsdp": 8}, "blocks_to_swap: got 3 with fsdp 8, want 0"),
        ({"blocks_to_swap": -1}, 'blocks_to_swap: got -1, want an integer of at least 0, or "auto"'),
        ({"blocks_to_swap": "all"}, "blocks_to_swap: got 'all', want an integer"),
        ({"blocks_to_swap": 7}, "blocks_to_swap: got 7, want 1 to 6, 2 less than there are"),
    ],
)
def test_bad_input(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(asked(tmp_path, **{"blocks_to_swap": 3} | changes), advise=False)
