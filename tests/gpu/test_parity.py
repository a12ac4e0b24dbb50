"""CUDA, Triton, the C++ kernels and the reference agree."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dancegrpo_fast import PolicyMetrics, backends, gaussian_noise, transition_step
from dancegrpo_fast.kernels.transition import reference

from ..ops.cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SHAPES,
    TABLES,
    Case,
    bits,
    dtype_id,
    make_case,
    sample,
    score,
    train,
)
from ..ops.test_noise import noise_table
from ..ops.test_policy_loss import OPTIONS, PER_SAMPLE, assert_matches_reference
from ..ops.test_transition import assert_scores, reference_score, reference_step
from ..tolerances import KERNELS_APART_ULPS, assert_same_noise, assert_within_budget
from .calls import results
from .targets import Target, at_home, differing_bits, on, on_every_target, on_gpu_targets

STEPS = torch.tensor([3, 1, 0, 2, 2, 1])
# Around a lane's window, a warp, and a block of each kernel (2,048 and 4,096 elements).
EDGES = (1, 2, 7, 8, 9, 255, 256, 257, 2047, 2048, 2049, 4095, 4096, 4097, 6151)


def skip_unless_held(target: Target, *dtypes: torch.dtype) -> None:
    if not target.holds(*dtypes):
        pytest.skip("Triton computes in float32")


def assert_sampling(case: Case, table, target: Target, out: torch.dtype, rounding: str = "exact") -> None:
    """Next latents and x0 with given noise are the C++ kernels' bits; the score keeps to the budget."""
    settings = {"rounding": rounding, "out_dtype": out, "return_denoised": True}
    found, here = sample(on(case, target), table, backend=target.backend, **settings), sample(case, table, **settings)
    assert bits(found.latents.cpu()) == bits(here.latents)
    assert bits(found.denoised.cpu()) == bits(here.denoised)
    compute = reference.compute_dtype(case.latents, case.output, case.uncond, here.latents)
    scores = (reference_score(case, table, here.latents, rounding, dtype) for dtype in (F64, compute))
    assert_within_budget(found.log_prob.cpu(), *scores)
    truth, plain = (reference_step(case, table, *of) for of in ((F64, rounding, F64), (out, rounding, compute)))
    assert_within_budget(found.latents.cpu(), truth[0], plain[0])


def assert_scoring(case: Case, table, target: Target, rounding: str = "exact") -> None:
    """The score and the gradient keep to the budget."""
    found = score(on(case, target), table, rounding=rounding, backend=target.backend)
    assert_scores(case, table, [t.cpu() for t in found], rounding)


def assert_loss(cases: list[Case], table, target: Target, **options) -> None:
    """Loss, gradient and metrics keep to the budget."""

    def there(case: Case, table, **settings) -> dict[str, torch.Tensor]:
        return at_home(train(on(case, target), table, backend=target.backend, **settings))

    assert_matches_reference(cases, table, there, **options)


@on_every_target
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_step_and_score(target: Target, dtypes: tuple, cfg: bool, rounding: str) -> None:
    skip_unless_held(target, *dtypes)
    table = TABLES["mixed"]
    case = make_case((6, 3, 1061), table, dtypes, cfg=cfg, step=STEPS)
    assert_sampling(case, table, target, dtypes[2], rounding)
    assert_scoring(case, table, target, rounding)


@on_every_target
@pytest.mark.parametrize("name", TABLES)
def test_every_sampler(target: Target, name: str) -> None:
    case = make_case((3, 5, 1123), TABLES[name], (F32, BF16, F32))
    assert_sampling(case, TABLES[name], target, F32)
    assert_scoring(case, TABLES[name], target)


@on_every_target
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, BF16)], ids=dtype_id)
def test_every_shape(target: Target, dtypes: tuple) -> None:
    table = TABLES["flow"]
    for shape in (*SHAPES, *((2, numel) for numel in EDGES)):
        case = make_case(shape, table, dtypes)
        assert_sampling(case, table, target, dtypes[2])
        assert_scoring(case, table, target)
    cases = [make_case((9, 3, 2049), table, dtypes, seed=seed) for seed in range(4)]
    assert_loss(cases, table, target, **OPTIONS["everything"])


@on_every_target
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (F32, BF16, F32), (BF16, BF16, BF16), (F16, F16, F16), (F64, BF16, F32)], ids=dtype_id
)
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.pairs
def test_loss(target: Target, dtypes: tuple, option: str, cfg: bool) -> None:
    skip_unless_held(target, *dtypes)
    cases = [make_case((9, 3, 701), TABLES["mixed"], dtypes, cfg=cfg, step=PER_SAMPLE, seed=s) for s in range(4)]
    assert_loss(cases, TABLES["mixed"], target, **OPTIONS[option])
    if not cfg:
        assert_loss(cases, TABLES["mixed"], target, rounding="reference", **OPTIONS[option])


@on_every_target
def test_samples_of_weight_0_are_left_out(target: Target) -> None:
    table = TABLES["flow"]
    case = on(make_case((6, 2500), table, (F32, BF16, F32)), target)
    poisoned = case.map(lambda t: t.clone())
    case.weight[2:4] = 0.0
    poisoned.weight[2:4] = 0.0
    poisoned.latents[2:4] = float("nan")
    found, wanted = (train(c, table, kl=True, backend=target.backend) for c in (poisoned, case))
    names = [n for n in found if n.startswith("metrics.") or n in ("loss", "grad", "has_grad")]
    assert all(torch.equal(found[n], wanted[n]) for n in names)
    assert not found["grad"][2:4].any() and int(found["metrics.samples"]) == 4
    assert len(names) == 3 + len(PolicyMetrics._fields)


@on_every_target
@pytest.mark.parametrize("numel", [1, 5, 2049, 100_003])
def test_noise_is_that_of_the_cpu(target: Target, numel: int, record_property: Callable) -> None:
    ids = torch.tensor([0, 1, 2**31, 2**32 + 7, 2**62])
    for seed in (0, 2**32, 2**63 - 1):
        there = gaussian_noise((numel,), seed=seed, sample_ids=ids.to(target.device), backend=target.backend).cpu()
        here = gaussian_noise((numel,), seed=seed, sample_ids=ids, backend="cpu")
        apart = differing_bits(there, here)
        record_property("differing noise bits", apart)
        assert_same_noise(there, here, KERNELS_APART_ULPS)
        # Compiled without contraction, so the operations are the same ones.
        assert target.backend != "cuda" or apart == 0


@on_every_target
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_seeded_step(target: Target, dtypes: tuple, record_property: Callable) -> None:
    """The bits of the same noise given; for CUDA, those of the C++ kernels."""
    skip_unless_held(target, *dtypes)
    table = TABLES["mixed"]
    case = make_case((6, 3, 1031), table, dtypes, cfg=True, step=STEPS)
    there = on(case, target)
    settings = {"seed": 8, "out_dtype": dtypes[2]}
    found = sample(there, table, backend=target.backend, **settings)
    # Each step has its own stream: a row of a table that adds nothing but noise gives it.
    zeros = torch.zeros_like(there.latents, dtype=F32)
    keys = {"seed": 8, "sample_ids": there.sample_ids, "backend": target.backend}
    noise = transition_step(zeros, zeros, noise_table(len(table)), there.step, **keys).latents
    given = sample(replace(there, noise=noise), table, backend=target.backend, out_dtype=dtypes[2])
    assert bits(found.latents.cpu()) == bits(given.latents.cpu())
    assert bits(found.log_prob.cpu()) == bits(given.log_prob.cpu())
    apart = differing_bits(found.latents, sample(case, table, backend="cpu", **settings).latents)
    record_property("differing latent bits", apart)
    assert target.backend != "cuda" or apart == 0


@on_every_target
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
def test_empty_inputs_are_refused(target: Target, shape: tuple[int, ...]) -> None:
    nothing = torch.empty(shape, device=target.device)
    with pytest.raises(ValueError, match="latents: got"):
        transition_step(nothing, nothing, TABLES["flow"], 0, seed=1, backend=target.backend)


@on_every_target
def test_results_equal_the_c_plus_plus_kernels_but_for_the_order_of_sums(target: Target) -> None:
    """What no sum enters is the same to the bit."""
    table = TABLES["flow"]
    case = make_case((8, 3, 1501), table, (F32, BF16, F32), cfg=True)
    found, wanted = results(on(case, target), table, target.backend), results(case, table, "cpu")
    assert found.keys() == wanted.keys()
    for name in ("given.latents", "given.denoised", "score.grad0", "score.grad1"):
        assert bits(found[name]) == bits(wanted[name]), name


@on_gpu_targets
def test_auto_takes_the_cuda_kernels(target: Target) -> None:
    device, found = torch.device("cuda", 0), {b.name: b for b in backends.available()}
    assert found[target.backend].available, found[target.backend].detail
    assert backends.pick(target.backend, device) == target.backend
    assert backends.pick("auto", device) == "cuda"
