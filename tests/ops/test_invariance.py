"""Bits that must not change with the batch, the threads, the instruction set, or from rollout to replay."""

import importlib
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dancegrpo_fast import backends, policy_loss, transition_step

from .cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    TABLES,
    Case,
    assert_same_bits,
    builds,
    dtype_id,
    everything,
    make_case,
    sample,
)

MIXES = ((F32, F32, F32), (F32, BF16, BF16), (BF16, BF16, BF16), (F16, F16, F32), (F64, F32, F64))
STEPS = torch.tensor([1, 2, 1, 3, 0, 2, 1, 2])


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.pairs
@pytest.mark.parametrize("dtypes", MIXES, ids=dtype_id)
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches(dtypes: tuple, rounding: str, per_sample: bool, size: int) -> None:
    """Powers of two, so that the mean over the batch scales gradients exactly."""
    table = TABLES["flow"]
    case = make_case((8, 3, 401), table, dtypes, cfg=True, step=STEPS if per_sample else 1)
    parts = [everything(case.select(slice(i, i + size)), table, rounding=rounding) for i in range(0, 8, size)]
    assert_same_bits(joined(parts), everything(case, table, rounding=rounding))


@pytest.mark.parametrize("dtypes", MIXES, ids=dtype_id)
def test_position_in_the_batch(dtypes: tuple) -> None:
    table = TABLES["dance"]
    case = make_case((8, 17, 31), table, dtypes, step=STEPS)
    order = [5, 0, 7, 2, 1, 6, 4, 3]
    whole = everything(case, table)
    assert_same_bits(everything(case.select(order), table), {k: v[order] for k, v in whole.items()})
    # A sample next to copies of itself, in a larger batch
    same = everything(case.select([3] * 16), table)
    assert all(torch.equal(v, v[:1].expand_as(v)) for v in same.values())
    assert torch.equal(same["score"][:1], whole["score"][3:4])


@pytest.mark.parametrize("dtypes", MIXES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 200_001), (3, 70_000), (8, 16385)], ids=str)
def test_thread_count(dtypes: tuple, shape: tuple[int, ...], threads: Callable[[int], None]) -> None:
    table = TABLES["flow"]
    case = make_case(shape, table, dtypes, cfg=True)
    wanted = everything(case, table)
    for count in (2, 3, 8):
        threads(count)
        assert backends.threads_for(case.latents.numel()) > 1
        assert_same_bits(everything(case, table), wanted)


def test_threads_are_torch_s_own_setting(threads: Callable[[int], None]) -> None:
    threads(2)
    assert backends.threads_for(1) == 1
    assert backends.threads_for(1 << 30) == 2
    threads(1)
    assert backends.threads_for(1 << 30) == 1


def on_build(name: str, monkeypatch: pytest.MonkeyPatch, run: Callable[[], dict]) -> dict:
    module = importlib.import_module(f"dancegrpo_fast.{name}")
    with monkeypatch.context() as patch:
        patch.setattr(backends, "cpu_module", lambda: module)
        return run()


@pytest.mark.parametrize("build", builds()[1:])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rounding", ["exact", "reference"])
def test_instruction_sets_agree(build: str, dtypes: tuple, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLES["mixed"]
    case = make_case((4, 3, 5, 1123), table, dtypes, cfg=True, step=torch.tensor([1, 2, 0, 3]))
    strided = case.map(lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2))
    for inputs in (case, strided):

        def run(inputs: Case = inputs) -> dict[str, torch.Tensor]:
            return everything(inputs, table, rounding=rounding)

        assert_same_bits(on_build(build, monkeypatch, run), on_build("_cpu", monkeypatch, run))


@pytest.mark.parametrize("name", [n for n, t in TABLES.items() if n != "mixed"])
@pytest.mark.parametrize("build", builds()[1:])
def test_instruction_sets_agree_for_every_sampler(build: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLES[name]
    case = make_case((4, 777), table)
    found = on_build(build, monkeypatch, lambda: everything(case, table))
    assert_same_bits(found, on_build("_cpu", monkeypatch, lambda: everything(case, table)))


def test_the_best_build_is_the_one_in_use() -> None:
    level = importlib.import_module("dancegrpo_fast._cpu").processor_level()
    wanted = {1: "_cpu", 3: "_cpu_v3", 4: "_cpu_v4"}[level]
    assert backends.cpu_module().__name__ == f"dancegrpo_fast.{wanted}"
    found = {b.name: b for b in backends.available()}
    assert list(found) == ["cpu", "cuda", "triton", "reference"]
    assert found["cpu"].available and found["reference"].available
    if not torch.cuda.is_available():
        assert not found["cuda"].available and not found["triton"].available
    assert all(b.detail for b in found.values())


@pytest.mark.pairs
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_first_ratio_is_exactly_one(
    dtypes: tuple, per_sample: bool, cfg: bool, rounding: str, seeded: bool, backend: str
) -> None:
    table = TABLES["mixed"]
    case = make_case((4, 1031), table, dtypes, cfg=cfg, step=torch.tensor([2, 0, 3, 1]) if per_sample else 2)
    settings = {"seed": 9} if seeded else {}
    step = sample(case, table, rounding=rounding, out_dtype=dtypes[2], backend=backend, **settings)
    case = replace(case, next_latents=step.latents, old_log_prob=step.log_prob)
    settings = {"weight": case.weight, "rounding": rounding, "backend": backend}
    result = policy_loss(*case.lost(table), **case.guided, **settings)
    assert torch.equal(result.ratio, torch.ones_like(result.ratio))
    assert result.metrics.ratio_max_dev == 0.0 and result.metrics.clip_fraction == 0.0
    assert result.metrics.approx_kl == 0.0


def test_first_ratio_through_a_trajectory_buffer() -> None:
    """Rollout into views of one buffer for the whole batch, replay in micro-batches of it."""
    table = TABLES["flow"]
    g = torch.Generator().manual_seed(1)
    buffer = torch.empty(4, 5, 3, 8, 8, dtype=BF16)
    buffer[:, 0] = torch.randn(4, 3, 8, 8, generator=g)
    outputs, scores = [], []
    for i in range(4):
        outputs.append(torch.randn(4, 3, 8, 8, generator=g).to(BF16))
        step = transition_step(buffer[:, i], outputs[-1], table, i, seed=3, out=buffer[:, i + 1])
        scores.append(step.log_prob)
    for i in range(4):
        for b in (slice(0, 1), slice(1, 3), slice(3, 4)):
            old, ones = scores[i][b], torch.ones_like(scores[i][b])
            result = policy_loss(buffer[b, i], outputs[i][b], buffer[b, i + 1], table, i, old, ones)
            assert torch.equal(result.ratio, ones)


def test_calls_from_two_threads_at_once(threads: Callable[[int], None]) -> None:
    """One of them owns the pool, the other works alone; both are right."""
    table = TABLES["flow"]
    threads(2)
    cases = [make_case((2, 100_000), table, seed=seed) for seed in (1, 2, 3)]
    assert_same_at_once(lambda case: everything(case, table), cases)


def assert_same_at_once(run: Callable[[Case], dict], cases: list[Case]) -> None:
    """Each case in a thread of its own, all of them started together, gives what it gives alone."""
    wanted = [run(case) for case in cases]
    start, failures = threading.Barrier(len(cases)), []

    def work(case: Case, want: dict) -> None:
        start.wait()
        try:
            for _ in range(5):
                assert_same_bits(run(case), want)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cases, wanted, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    assert not failures, failures[0]
