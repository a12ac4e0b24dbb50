"""One pass in a plan: what is held until rewards are known, the seconds it saves, and which kind is taken."""

import math
from typing import Any

import pytest
import torch

from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.margins import limit
from dancegrpo_fast.memory.planning.passes import WHILE, calls
from dancegrpo_fast.memory.planning.planner import Plan, plan, with_passes
from dancegrpo_fast.memory.planning.settings import GIB
from dancegrpo_fast.memory.planning.sharding import weights_of

from .small import phase_of

pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("collected_once")


def planned(flux: Plan, **changes: Any) -> Plan:
    return plan(flux.settings.changed(**changes), advise=False)


@pytest.mark.parametrize("kind", ["retain", "reweight"])
def test_what_is_held_is_there_until_the_rewards_are(flux: Plan, kind: str) -> None:
    found, iteration = planned(flux, passes=kind), Iteration(flux.settings)
    blocks = iteration.pick().blocks
    held = flux.settings.samples * weights_of(iteration.replay).trainable * 4
    # Sums, and a float32 output of each call.
    held += iteration.training_calls * math.prod(iteration.grid) * iteration.spec.latent_channels * 4
    if kind == "retain":
        held = (iteration.training_calls - 1) * round(sum(blocks.kept().values()))
        # Of blocks that are computed again their inputs, and what the trace keeps beside them.
        assert sum(blocks.kept().values()) >= blocks.kept()["block inputs"] > 0
    for one, two in zip(found.phases, flux.phases, strict=True):
        more = held if one.name in WHILE else 0
        assert abs(one.bytes - two.bytes - more) <= iteration.training_calls
    # The replay's forwards are the rollout's.
    calls = flux.settings.samples * flux.settings.num_steps
    saved = phase_of(flux, "rollout").seconds * iteration.training_calls / calls
    assert flux.seconds - found.seconds == pytest.approx(saved)
    assert 0 < phase_of(found, "rollout").seconds < phase_of(flux, "rollout").seconds


def test_the_kind_is_what_fits(flux: Plan) -> None:
    """Graphs, or else gradients of every sample, or else two passes; and two where one would not be faster."""
    graphs, sums = (max(p.bytes for p in planned(flux, passes=kind).phases) for kind in ("retain", "reweight"))
    bare = flux.settings.changed(passes="1")
    for room, kind in ((graphs, "retain"), (sums, "reweight"), (sums - GIB, "2")):
        gib = _card(flux, room)
        chosen, why = with_passes(bare.changed(gpu_gib=gib))
        assert chosen == kind and why.startswith(f"passes {kind}: ")
        assert any(reason == why for reason in planned(flux, passes="1", gpu_gib=gib).reasons)
    assert with_passes(bare.changed(kl_reference=True, gpu_gib=_card(flux, sums)))[0] == "2"
    # Graphs of samples that best-of-N leaves out are dropped; their sums are there already.
    few = bare.changed(trained_share=0.1)
    assert with_passes(few.changed(gpu_gib=_card(flux, graphs)))[0] == "retain"
    chosen, why = with_passes(few.changed(gpu_gib=_card(flux, sums)))
    assert chosen == "2" and "passes reweight: its backward takes" in why


@pytest.mark.parametrize(
    ("samples", "rows", "steps", "fraction"), [(8, 8, 20, 0.3), (12, 12, 16, 0.6), (24, 4, 16, 0.6), (12, 1, 16, 0.6)]
)
def test_calls_are_those_that_samples_deal(flux: Plan, samples: int, rows: int, steps: int, fraction: float) -> None:
    """Each sample draws its own steps, and a call has one step."""
    changes = {"group_size": samples, "micro_batch": rows, "num_steps": steps, "timestep_fraction": fraction}
    generator, trained = torch.Generator().manual_seed(0), round(steps * fraction)
    rounds = 2000
    drawn = torch.rand(rounds, samples, steps - 1, generator=generator).argsort(-1)[..., :trained]
    each = torch.zeros(rounds, samples, steps - 1).scatter_(-1, drawn, 1.0).sum(1)
    needed = (each / rows).ceil().sum(-1)
    error = needed.std() / rounds**0.5 + 1 / rounds
    assert abs(calls(flux.settings.changed(**changes)) - needed.mean()) <= 5 * error


def _card(flux: Plan, room: float) -> float:
    """GiB of a card that has just room for so many bytes of tensors."""
    low, high = 0.0, 1e5
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if limit(flux.settings, middle) > room else (middle, high)
    return high


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": "3"}, 'passes: got "3", want one of 2, 1, retain, reweight'),
        ({"passes": "1", "fsdp": 8}, 'passes: got "1" with shards'),
        ({"passes": "reweight", "lora": 0}, 'passes: got "reweight" with full fine-tuning'),
        ({"passes": "reweight", "kl_reference": True}, 'passes: got "reweight" with a KL'),
        ({"passes": "reweight", "block_ops": "lossless"}, 'passes: got "reweight" with block_ops "lossless"'),
        ({"passes": "retain", "offload": ("denoiser",)}, 'passes: got "retain" with offload denoiser'),
        ({"trained_share": 1.5}, "trained_share: got 1.5, want more than 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused(flux: Plan, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(flux, **changes)
