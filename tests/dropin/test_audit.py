"""The audit of the first update: what it finds in small scripts, and that it waits for no device in their loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from dancegrpo_fast.dropin.audit import Fingerprints
from dancegrpo_fast.dropin.replaced import Replacements
from dancegrpo_fast.dropin.settings import Settings

from ..compat.cases import BF16, F32, PEERS, SIGMAS, draw

F16 = torch.float16
STEPS = len(SIGMAS) - 1


def unchanged(value: Any, *_: Any) -> Any:
    return value


class Script:
    """A script of DanceGRPO's shape: a rollout without gradients, a replay of each sample of each step, one update.

    `between` is what it does to latents between steps, `stored` to those that it keeps, `model` to the model's output.
    """

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = unchanged,
        stored: Callable[[Tensor], Tensor] = unchanged,
        model: Callable[[Tensor, str], Tensor] = unchanged,
        together: bool = False,
        **settings: Any,
    ) -> None:
        self.between, self.stored, self.model, self.together = between, stored, model, together
        self.said: list[str] = []
        self.all = Replacements(Settings(**settings), self.said.append)
        self.step = self.all.stand_in(PEERS["dancegrpo"].flux_step, None, "train.py:1")
        torch.manual_seed(0)
        self.net = torch.nn.Linear(6, 6)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3)

    def output(self, x: Tensor, phase: str) -> Tensor:
        # By elements, so that a batch changes nothing.
        return self.model((x.to(F32)[..., None, :] * self.net.weight).sum(-1), phase)

    def rollout(self) -> list[tuple[Tensor, Tensor, int]]:
        x, kept = torch.randn(4, 5, 6), []
        with torch.no_grad():
            for i in range(STEPS):
                after = self.step(self.output(x, "rollout"), x.to(F32), 0.3, SIGMAS, i, None, True, True)[0]
                following = self.between(after)
                kept.append((self.stored(x), self.stored(following), i))
                x = following
        return kept

    def replay(self, kept: list[tuple[Tensor, Tensor, int]]) -> None:
        for x, after, i in kept:
            for rows in [slice(None)] if self.together else [slice(row, row + 1) for row in range(len(x))]:
                now, then = x[rows], after[rows].to(F32)
                at = torch.tensor(i)
                score = self.step(self.output(now, "replay"), now.to(F32), 0.3, SIGMAS, at, then, True, True)[2]
                score.sum().backward()

    def update(self, kept: list[tuple[Tensor, Tensor, int]]) -> dict[str, Any]:
        self.replay(kept)
        self.optimizer.step()
        return self.found

    def run(self) -> dict[str, Any]:
        return self.update(self.rollout())

    @property
    def found(self) -> dict[str, Any]:
        """What is reported of the first update."""
        return self.all.report()["first_update"]

    def findings(self) -> list[str]:
        """All that is said after which function is replaced."""
        return [line for line in self.said if " -> " not in line]


def test_a_script_that_replays_what_it_drew() -> None:
    script = Script()
    found = script.run()
    assert found["largest"] == 0 and found["pairs"] == 4 * STEPS and found["never_drawn"] == 0
    assert script.findings() == []
    assert found["text"] == "first update: largest abs(ratio - 1) 0, 16 of 16 replayed samples were drawn"


def test_latents_that_are_cast_after_each_step() -> None:
    script = Script(between=lambda x: x.to(BF16))
    found = script.run()
    assert found["largest"] > 0 and found["pairs"] == 4 * STEPS
    first, second = script.findings()
    assert first == (
        f"first update: {STEPS - 1} of {STEPS - 1} rollout calls start from the bfloat16 rounding of what the call"
        " before returned: --latents bfloat16 rounds them before they are scored"
    )
    assert second.startswith("first update: 16 of 16 replayed samples have their next latents in bfloat16, and were")
    assert second.endswith("--latents bfloat16 scores them as stored")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_latents_that_are_scored_as_stored(dtype: torch.dtype) -> None:
    script = Script(between=lambda x: x.to(dtype), latents=str(dtype).removeprefix("torch."))
    assert script.run()["largest"] == 0 and script.findings() == []


def test_latents_that_go_on_from_a_rounding_of_what_is_stored() -> None:
    # flow_grpo's pipeline of 2025-07: what it stores is not what the next step starts from.
    script = Script()
    x, kept = torch.randn(4, 5, 6), []
    with torch.no_grad():
        for i in range(STEPS):
            seen = x.to(BF16)
            after = script.step(script.output(seen, "rollout"), seen.to(F32), 0.3, SIGMAS, i, None, True, True)[0]
            kept.append((x, after, i))
            x = after
    found = script.update(kept)
    first, second = script.findings()
    assert "--latents bfloat16" in first and "16 of 16 replayed samples start from other latents" in second
    assert found["largest"] > 0 and found["never_drawn"] == 0


def test_latents_that_are_changed_between_the_steps() -> None:
    script = Script(between=lambda x: x * 1.001)
    found = script.run()
    near, never = script.findings()
    assert f"{STEPS - 1} of {STEPS - 1} rollout calls start from other latents than the call before returned" in near
    assert "16 of 16 replayed samples were never drawn" in never and found["never_drawn"] == 16
    assert found["largest"] is None


def test_two_trajectories_and_a_change_in_place() -> None:
    script = Script()
    assert script.update(script.rollout() + script.rollout())["pairs"] == 8 * STEPS and script.findings() == []
    script = Script(between=lambda x: x.mul_(1.001))
    script.rollout()
    script.all.finish()
    assert script.found["pairs"] == 0


def in_bf16(v: Tensor, phase: str) -> Tensor:
    return v.to(BF16) if phase == "replay" else v


def dropped_out(v: Tensor, phase: str) -> Tensor:
    return v + 1e-3 * (phase == "replay")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": in_bf16, "together": True}, ": model output float32 in rollout and bfloat16 in replay"),
        ({"model": dropped_out, "together": True}, ": the model's output differs: dropout"),
        ({"model": dropped_out}, ": batch 4 in rollout and 1 in replay"),
    ],
)
def test_a_ratio_that_is_not_1_and_why(changes: dict[str, Any], reason: str) -> None:
    script = Script(**changes)
    found = script.run()
    assert found["largest"] > 0
    (line,) = script.findings()
    assert line.startswith("first update: abs(ratio - 1) is up to ") and reason in line


def test_only_the_first_update_counts() -> None:
    script = Script()
    kept = script.rollout()
    for _ in range(2):
        assert script.update(kept)["largest"] == 0
        assert script.all.audit is not None and not script.all.audit.open


def test_other_hooks_of_an_optimizer_are_called() -> None:
    steps: list[int] = []
    first, last = Script(), Script()
    handles = [register_optimizer_step_pre_hook(lambda *_: steps.append(1))]
    for script in (first, last):
        script.run()
    handles.append(register_optimizer_step_pre_hook(lambda *_: steps.append(2)))
    last.optimizer.step()
    for handle in handles:
        handle.remove()
    assert steps == [1, 1, 1, 2]
    assert [script.found["largest"] for script in (first, last)] == [0, 0]


def test_what_was_not_seen_is_said() -> None:
    script = Script()
    script.rollout()
    text = script.found["text"]
    assert text == "the first update was not audited: no replay with a gradient was seen in this process"
    script = Script()
    x = torch.randn(4, 5, 6)
    script.replay([(x, x, 1)])
    assert "no rollout was seen" in script.found["text"]
    script = Script()
    script.optimizer.step()
    script.rollout()
    assert script.all.audit is not None and script.all.audit.open
    script.optimizer.step()
    assert not script.all.audit.open  # nothing more is kept, for however long the script goes on
    assert "an optimiser stepped before any" in script.found["text"]


def test_an_optimizer_that_is_not_torch_s() -> None:
    script = Script()
    script.replay(script.rollout())
    with torch.no_grad():
        script.net.weight.mul_(1.1)
    script.replay(script.rollout())
    assert script.found["largest"] == 0


class Reads(TorchDispatchMode):
    """Counts what would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_in_the_step_loop() -> None:
    script = Script(between=lambda x: x.to(BF16).to(F32))
    script.rollout()
    dispatch = script.all.definitions[0].dispatch
    assert dispatch is not None
    dispatch.meter.untimed = "the original reads where it is timed"
    with Reads() as reads:
        kept = script.rollout()
    script.replay(kept[:1])  # makes a trial
    with reads:
        script.replay(kept[1:])
    assert reads.count == 0 and script.all.audit is not None and script.all.audit.open
    script.optimizer.step()
    assert not script.all.audit.open and len(script.findings()) == 2


def test_fingerprints_follow_numbers_not_their_form() -> None:
    prints = Fingerprints()
    x = draw(BF16, 1, (6, 8, 5, 3)).float()
    wanted = prints(x)
    assert len(set(wanted.tolist())) == 6
    assert torch.equal(prints(x.to(BF16)), wanted) and torch.equal(prints(x.double()), wanted)
    assert torch.equal(prints(x[2:3]), wanted[2:3]) and torch.equal(prints(x.flip(0)), wanted.flip(0))
    assert torch.equal(prints(x.contiguous(memory_format=torch.channels_last)), wanted)
    assert torch.equal(prints(x * 0), prints(-(x * 0)))
    moved = x.clone()
    moved[:, 0, 0, 0], moved[:, 0, 0, 1] = x[:, 0, 0, 1], x[:, 0, 0, 0]
    assert not bool((prints(moved) == wanted).any())
