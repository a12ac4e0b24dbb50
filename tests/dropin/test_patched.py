"""Replacing functions in imported modules."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dancegrpo_fast.compat import Replacement, patched

from ..compat.cases import CASES, F32, PEERS, SIGMAS, draw


@pytest.fixture
def holder() -> Iterator[ModuleType]:
    """A module that did `from m import f` before."""
    module = ModuleType("holder")
    module.step, module.other = PEERS["mixgrpo"].flow_grpo_step, len
    sys.modules["holder"] = module
    yield module
    del sys.modules["holder"]


def test_functions_are_replaced_wherever_they_were_imported_to(holder: ModuleType) -> None:
    peer = PEERS["mixgrpo"]
    original = peer.flow_grpo_step
    with patched(peer, rounding="reference", backend="reference") as done:
        assert Replacement(peer.__name__, "flow_grpo_step", "dancegrpo_fast.compat.mixgrpo.flow_grpo_step") in done
        assert Replacement("holder", "step", "dancegrpo_fast.compat.mixgrpo.flow_grpo_step") in done
        # STEP: of other tests' modules.
        assert {r.function for r in done} - {"STEP"} == {"flow_grpo_step", "dance_grpo_step", "step"}
        assert holder.step is peer.flow_grpo_step is not original and holder.other is len
        found = holder.step(draw(F32, 1), draw(F32, 2), 0.7, SIGMAS, 1, draw(F32, 3))
        assert not found[0].requires_grad and found[2].shape == (8,)
    assert holder.step is peer.flow_grpo_step is original


def test_what_is_imported_within_the_block_is_put_back_too(holder: ModuleType) -> None:
    peer = PEERS["mixgrpo"]
    original = peer.flow_grpo_step
    with patched(peer):
        holder.late = peer.flow_grpo_step
    assert holder.late is original


def test_methods_are_replaced_on_their_class_and_put_back_after_an_exception() -> None:
    case, modules = CASES["verl_omni dance"], [PEERS["verl_omni"], PEERS["flow_factory"], PEERS["ddpo"]]
    scheduler = PEERS["verl_omni"].FlowMatchSDEDiscreteScheduler
    original = scheduler.sample_previous_step
    with pytest.raises(KeyError), patched(modules) as done:
        names = {"FlowMatchSDEDiscreteScheduler.sample_previous_step", "ddim_step_with_logprob"}
        names |= {f"{kind}SDEScheduler.step" for kind in ("FlowMatchEulerDiscrete", "UniPCMultistep")}
        assert {r.function for r in done} == names
        v, x, after = draw(F32, 1), draw(F32, 2), draw(F32, 3)
        assert torch.equal(case.peer(v, x, after)["log_prob"], case.ours(v, x, after)["log_prob"])
        raise KeyError
    assert scheduler.sample_previous_step is original


def test_nothing_to_replace_and_unknown_signatures_are_refused() -> None:
    wanted = r"os with none of(.|\n)*flux_step\(model_output: .* latents: .*sde_solver"
    with pytest.raises(ValueError, match=wanted), patched(os):
        pass
    fork = ModuleType("fork")
    exec("def flow_grpo_step(model_output, latents, eta, index, prev_sample, generator=None): ...", vars(fork))
    wanted = r"got flow_grpo_step\(.*generator=None\); as .*mixgrpo.flow_grpo_step it has no parameter sigmas"
    with pytest.raises(ValueError, match=wanted), patched(fork):
        pass


def test_bad_settings_and_calls_beyond_ours_raise() -> None:
    peer = PEERS["mixgrpo"]
    with pytest.raises(ValueError, match='rounding: got "no", want "exact" or'), patched(peer, rounding="no"):
        pass
    with pytest.raises(ValueError, match='backend: got "no", want "auto",'), patched(peer, backend="no"):
        pass
    v = draw(F32, 1).requires_grad_()
    with patched(peer), pytest.raises(ValueError, match=r"ours is for sampling without gradients$"):
        peer.flow_grpo_step(v, draw(F32, 2), 0.7, SIGMAS, 1, None)


def test_a_static_method_is_refused_and_nothing_stays_replaced() -> None:
    class FlowMatchSDEDiscreteScheduler:
        @staticmethod
        def sample_previous_step() -> None: ...

    fork = ModuleType("fork")
    fork.kind, step = FlowMatchSDEDiscreteScheduler, PEERS["mixgrpo"].flow_grpo_step
    with pytest.raises(ValueError, match="got a staticmethod, want a function"), patched([PEERS["mixgrpo"], fork]):
        pass
    assert PEERS["mixgrpo"].flow_grpo_step is step


def test_a_function_that_does_something_else_raises_when_it_is_called() -> None:
    fork = ModuleType("fork")
    text = Path(PEERS["mixgrpo"].__file__).read_text()
    exec(text.replace("torch.log(tau) - 0.5", "torch.log(tau) - 0.6"), vars(fork))
    arguments = (draw(F32, 1), draw(F32, 2), 0.7, SIGMAS, 1, None)
    with patched(fork):
        wanted = r"fork flow_grpo_step: not replaced: closest .*output 2 \(log-probability\) is off by 0.184"
        for _ in range(2):
            with pytest.raises(ValueError, match=wanted):
                fork.flow_grpo_step(*arguments)
        assert len(fork.dance_grpo_step(*arguments, True, True)) == 3
    assert len(fork.flow_grpo_step(*arguments)) == 5
