"""The counter-based noise: the generator's published vectors, its keys, and its distribution."""

import importlib
from dataclasses import replace

import pytest
import torch

from dancegrpo_fast import backends, gaussian_noise, transition_step
from dancegrpo_fast.kernels.transition import reference
from dancegrpo_fast.transitions import TransitionTable

from ..tolerances import assert_same_noise, assert_standard_normal, assert_uncorrelated
from .cases import BACKENDS, BF16, F16, F32, F64, TABLES, bits, builds, dtype_id, make_case, sample

# Random123's known answers for philox4x32-10: counter, key, result.
ONES = 0xFFFFFFFF
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
@pytest.mark.parametrize("build", builds())
def test_known_answers_of_the_builds(build: str, counter: tuple, key: tuple, wanted: tuple) -> None:
    assert importlib.import_module(f"dancegrpo_fast.{build}").philox(counter, key) == wanted


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers_of_the_reference(counter: tuple, key: tuple, wanted: tuple) -> None:
    words = reference._philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in words) == wanted


def noise_table(steps: int) -> TransitionTable:
    """Every row adds unit noise to nothing."""
    return TransitionTable.from_coefficients([0.0] * steps, 0.0, 1.0, kind="none")


def draw(
    ids: list[int], numel: int, seed: int = 5, step: int | torch.Tensor = 0, backend: str = "cpu", steps: int = 8
) -> torch.Tensor:
    zeros = torch.zeros(len(ids), numel)
    settings = {"seed": seed, "sample_ids": torch.tensor(ids), "backend": backend}
    return transition_step(zeros, zeros, noise_table(steps), step, **settings).latents


@pytest.mark.parametrize("build", builds())
@pytest.mark.parametrize("numel", [1, 3, 4, 5, 511, 512, 16383, 16385, 100_003])
def test_kernel_draws_the_reference_noise(build: str, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"dancegrpo_fast.{build}")
    monkeypatch.setattr(backends, "cpu_module", lambda: module)
    ids = [0, 1, 2**31, 2**32 + 7, 2**62]
    for seed, step in ((0, 0), (2**63 - 1, 7), (2**32, 3)):
        assert_same_noise(draw(ids, numel, seed, step), draw(ids, numel, seed, step, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keyed_by_seed_id_step_and_element_only(backend: str) -> None:
    ids, steps = [11, 3, 3, 2**40], torch.tensor([2, 5, 2, 0])
    whole = draw(ids, 1000, step=steps, backend=backend)
    for b, (name, step) in enumerate(zip(ids, steps.tolist(), strict=True)):
        assert torch.equal(draw([name], 1000, step=step, backend=backend)[0], whole[b])
        # A shorter sample is a prefix; a table of another length changes nothing.
        assert torch.equal(draw([0, name], 37, step=step, backend=backend, steps=6)[1], whole[b, :37])
    assert not torch.equal(whole[1], whole[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part_of_the_key_counts(backend: str) -> None:
    """Neighbouring and far apart values of each part, their high words included, give different streams."""
    base = draw([0], 64, 0, 0, backend)
    keys = [([1], 0, 0), ([2**32], 0, 0), ([0], 1, 0), ([0], 2**32, 0), ([0], 0, 1), ([0], 0, 7)]
    streams = [draw(ids, 64, seed, step, backend) for ids, seed, step in keys] + [base]
    for i, first in enumerate(streams):
        assert not any(bool((first == other).any()) for other in streams[:i])
    blocks = base.reshape(16, 4)
    assert len({tuple(block.tolist()) for block in blocks}) == 16


def test_default_ids_count_from_zero() -> None:
    zeros = torch.zeros(3, 10)
    step = transition_step(zeros, zeros, noise_table(1), 0, seed=4)
    assert torch.equal(step.latents, draw([0, 1, 2], 10, 4))


@pytest.mark.parametrize(
    "dtypes", [(F32, BF16, F32), (BF16, BF16, BF16), (F64, F64, F64), (F32, F16, F16)], ids=dtype_id
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_seeded_step_equals_the_same_noise_given(dtypes: tuple, backend: str) -> None:
    table = TABLES["mixed"]
    case = make_case((4, 3, 171), table, dtypes, cfg=True, step=torch.tensor([1, 2, 0, 1]))
    noise = draw(case.sample_ids.tolist(), 3 * 171, 8, case.step, backend).reshape(4, 3, 171)
    seeded = sample(case, table, seed=8, backend=backend, out_dtype=dtypes[2])
    given = sample(replace(case, noise=noise), table, backend=backend, out_dtype=dtypes[2])
    assert bits(seeded.latents) == bits(given.latents) and bits(seeded.log_prob) == bits(given.log_prob)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gaussian_noise(backend: str) -> None:
    ids = torch.tensor([4, 4, 9])
    found = gaussian_noise((3, 5, 7), seed=2, sample_ids=ids, backend=backend)
    assert found.shape == (3, 3, 5, 7) and found.dtype == F32
    # The complement of the seed in the key, step 0 in the counter.
    wanted = reference.normals(2 ^ 0xFFFFFFFFFFFFFFFF, ids, torch.zeros_like(ids), 105)
    assert_same_noise(found.flatten(1), wanted)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    for dtype in (BF16, F16, F64):
        narrow = gaussian_noise((3, 5, 7), seed=2, sample_ids=ids, dtype=dtype, backend=backend)
        assert torch.equal(narrow, found.to(dtype))
    assert torch.equal(found, gaussian_noise([3, 5, 7], seed=2, sample_ids=ids, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_no_step_draws_the_noise_of_gaussian_noise(seed: int, backend: str) -> None:
    """Initial latents and the noise of any step share no number, of whatever seed that is near by its bits."""
    ids = [0, 1, 2**32 + 1, -1]
    initial = gaussian_noise((64,), seed=seed, sample_ids=torch.tensor(ids), backend=backend)
    for other in {seed, 2**63 - 1 - seed, seed ^ 1, (seed + 2**32) % 2**63}:
        for step in (0, 1, 7):
            assert not bool((draw(ids, 64, other, step, backend) == initial).any())
    assert_uncorrelated(
        gaussian_noise((200_000,), seed=seed, sample_ids=torch.tensor([3]), backend="cpu")[0],
        draw([3], 200_000, seed)[0],
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_gaussian_noise_compiles(dynamic: bool) -> None:
    def run(seed: int, size: int) -> torch.Tensor:
        return gaussian_noise((2, size), seed=seed, sample_ids=torch.arange(3))

    torch._dynamo.reset()
    function = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed, size in ((3, 5), (4, 6), (2**63 - 1, 7)):
        assert torch.equal(function(seed, size), run(seed, size))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_normal_distribution(seed: int) -> None:
    assert_standard_normal(draw([0, 1, 2**33], 200_000, seed))
    assert_standard_normal(gaussian_noise((200_000,), seed=seed, sample_ids=torch.tensor([0, 1, 2**33])))


def test_normal_across_the_batch() -> None:
    """One element from each of many samples, steps or seeds is as good a stream as many elements of one."""
    assert_standard_normal(draw(list(range(100_000)), 1))
    assert_standard_normal(draw([0] * 100_000, 1, step=torch.arange(100_000), steps=100_000))
    assert_standard_normal(torch.cat([draw([0], 8, seed) for seed in range(2000)]))


def test_extremes_are_finite() -> None:
    values = draw([0], 4_000_000)
    assert bool(values.isfinite().all())
    assert values.max() > 4.5 and values.min() < -4.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 512, 16384])
def test_elements_are_uncorrelated(lag: int) -> None:
    values = draw([1], 300_000)[0]
    assert_uncorrelated(values[:-lag], values[lag:])


def test_neighbouring_streams_are_uncorrelated() -> None:
    base = draw([6], 200_000, 5, 2)
    for ids, seed, step in (([7], 5, 2), ([6 + 2**32], 5, 2), ([6], 6, 2), ([6], 5 + 2**32, 2), ([6], 5, 3)):
        assert_uncorrelated(base, draw(ids, 200_000, seed, step))
