"""The ops in CUDA graphs: captured together, replayed with other inputs, on other streams, beside eager calls."""

from dataclasses import fields

import torch
from torch import Tensor

from ..ops.cases import BF16, F32, TABLES, Case, assert_same_bits, make_case, sample, score, train
from .targets import Target, at_home, captured, on, on_every_target, stream_of

TABLE = TABLES["flow"]
# Several blocks a sample, so that tickets and scratch are in use.
SHAPE = (3, 7, 2500)


def iteration(case: Case, target: Target) -> dict[str, Tensor]:
    """A seeded step, a score with its gradient, and a loss with its gradient."""
    step = sample(case, TABLE, seed=4, backend=target.backend)
    log_prob, grad = score(case, TABLE, backend=target.backend)
    found = {"latents": step.latents, "step.log_prob": step.log_prob, "log_prob": log_prob, "score.grad": grad}
    return found | train(case, TABLE, kl=True, backend=target.backend)


def refill(case: Case, other: Case) -> None:
    """Writes another case's values into the tensors that a graph reads."""
    for f in fields(case):
        if isinstance(value := getattr(case, f.name), Tensor):
            value.copy_(getattr(other, f.name))


def cases(target: Target) -> list[Case]:
    return [on(make_case(SHAPE, TABLE, (F32, BF16, F32), seed=seed), target) for seed in range(3)]


@on_every_target
def test_replays_follow_their_inputs(target: Target) -> None:
    static, *others = cases(target)
    wanted = [at_home(iteration(other, target)) for other in others]
    outputs, replay = captured(target, lambda: iteration(static, target))
    for other, want in zip([*others, *others], [*wanted, *wanted], strict=True):
        refill(static, other)
        replay()
        assert_same_bits(at_home(outputs), want)


@on_every_target
def test_replays_on_another_stream(target: Target) -> None:
    static, other, _ = cases(target)
    want = at_home(iteration(other, target))
    outputs, replay = captured(target, lambda: iteration(static, target))
    refill(static, other)
    for _ in range(3):
        with stream_of(target):
            replay()
        assert_same_bits(at_home(outputs), want)


@on_every_target
def test_replays_beside_eager_calls(target: Target) -> None:
    """A graph has its own tickets and scratch: eager calls on another stream at the same time touch neither."""
    static, other, _ = cases(target)
    want_here, want_there = at_home(iteration(other, target)), at_home(iteration(static, target))
    outputs, replay = captured(target, lambda: iteration(static, target))
    target.synchronize()
    if target.device == "cpu":
        replay()
        assert_same_bits(at_home(outputs), want_there)
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    eager = []
    for _ in range(20):
        with torch.cuda.stream(side):
            replay()
        eager.append(iteration(other, target))
    target.synchronize()
    assert_same_bits(at_home(outputs), want_there)
    for found in eager:
        assert_same_bits(at_home(found), want_here)


@on_every_target
def test_two_graphs_share_nothing(target: Target) -> None:
    first, second, _ = cases(target)
    wanted = [at_home(iteration(case, target)) for case in (first, second)]
    graphs = [captured(target, lambda case=case: iteration(case, target)) for case in (first, second)]
    for _ in range(3):
        for _, replay in graphs:
            replay()
    for (outputs, _), want in zip(graphs, wanted, strict=True):
        assert_same_bits(at_home(outputs), want)
