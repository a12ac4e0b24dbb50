"""Streams and devices: the current ones are used, nothing waits, and calls at the same time do not meet."""

from dataclasses import replace

import pytest
import torch

from dancegrpo_fast import transition_log_prob, transition_step

from ..ops.cases import BF16, F32, TABLES, Case, assert_same_bits, make_case
from ..ops.test_invariance import assert_same_at_once
from .calls import calls_of, results
from .targets import Target, assert_nothing_waits, guard, on, on_every_target, on_gpu_targets, stream_of

TABLE = TABLES["flow"]


def case_on(target: Target, seed: int = 0, shape: tuple[int, ...] = (3, 7, 2500)) -> Case:
    return on(make_case(shape, TABLE, (F32, BF16, F32), seed=seed), target)


@on_every_target
def test_a_side_stream(target: Target) -> None:
    case = case_on(target)
    wanted = results(case, TABLE, target.backend)
    with stream_of(target):
        found = results(case, TABLE, target.backend)
    assert_same_bits(found, wanted)


@on_gpu_targets
def test_work_is_queued_on_the_current_stream(target: Target) -> None:
    """An input that is written late on that stream is read late, and the host has long gone on."""
    case = case_on(target)
    wanted = transition_step(case.latents, case.output, TABLE, 1, seed=2, backend=target.backend)
    side = torch.cuda.Stream()
    # The first time it takes memory for that stream.
    for cycles in (1, 200_000_000):
        late = torch.zeros_like(case.latents)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(cycles)
            late.copy_(case.latents)
            found = transition_step(late, case.output, TABLE, 1, seed=2, backend=target.backend)
        went_on = not side.query()
        side.synchronize()
        assert torch.equal(found.latents, wanted.latents) and torch.equal(found.log_prob, wanted.log_prob)
    assert went_on


@on_every_target
def test_nothing_waits_for_the_device(target: Target) -> None:
    for step in (1, torch.tensor([2, 0, 1])):
        case = on(make_case((3, 7, 2500), TABLE, (F32, BF16, F32), cfg=True, step=step), target)
        assert_nothing_waits(target, calls_of(case, TABLE, target.backend).values())


@on_every_target
def test_calls_on_two_streams_at_once(target: Target) -> None:
    """Each stream has its own tickets; long queues on both overlap."""
    cases = [case_on(target, seed, (16, 40_001)) for seed in (1, 2)]
    steps = [calls_of(case, TABLE, target.backend)["seeded step"] for case in cases]
    wanted = [step() for step in steps]
    streams = [None, None] if target.device == "cpu" else [torch.cuda.Stream() for _ in cases]
    target.synchronize()
    found: list[list] = [[], []]
    for _ in range(5 if target.device == "cpu" else 50):
        for place, step in enumerate(steps):
            with torch.cuda.stream(streams[place]):
                found[place].append(step())
    target.synchronize()
    for mine, want in zip(found, wanted, strict=True):
        assert all(torch.equal(s.latents, want.latents) and torch.equal(s.log_prob, want.log_prob) for s in mine)


@on_every_target
def test_two_threads_on_one_stream(target: Target) -> None:
    cases = [case_on(target, seed) for seed in (1, 2)]
    assert_same_at_once(lambda case: results(case, TABLE, target.backend), cases)


@on_gpu_targets
def test_a_device_that_is_not_current(target: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    wanted = results(case_on(target), TABLE, target.backend)
    there = case_on(Target("cuda:1", target.backend))
    with guard(target, 0):
        assert_same_bits(results(there, TABLE, target.backend), wanted)
        assert torch.cuda.current_device() == 0


@on_gpu_targets
def test_a_row_outside_the_table_is_nan_and_no_fault(target: Target) -> None:
    case = case_on(target)
    for outside in (len(TABLE), -1, 2**40, -(2**62)):
        step = torch.tensor([1, outside, 2], device="cuda")
        found = transition_step(case.latents, case.output, TABLE, step, seed=3, backend=target.backend)
        log_prob = transition_log_prob(*replace(case, step=step).scored(TABLE), backend=target.backend)
        torch.cuda.synchronize()
        assert bool(found.latents[1].isnan().all())
        assert found.log_prob.isnan().tolist() == log_prob.isnan().tolist() == [False, True, False]
