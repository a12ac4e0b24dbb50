"""`transition_step` and `transition_log_prob` against the definition in float64, and in every layout."""

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from dancegrpo_fast import transition_log_prob, transition_step
from dancegrpo_fast.kernels.transition import reference
from dancegrpo_fast.transitions import TransitionTable

from ..tolerances import assert_same_formula, assert_within_budget
from .cases import (
    BACKENDS,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SHAPES,
    STEPS,
    TABLES,
    Case,
    assert_same_bits,
    bits,
    dtype_id,
    everything,
    make_case,
    sample,
    score,
)


def rounding_dtype(case: Case, rounding: str) -> torch.dtype | None:
    """What the published code holds its products in: float32 or wider after guidance."""
    return None if rounding == "exact" else case.output.dtype if case.uncond is None else F64


def reference_score(case: Case, table: TransitionTable, stored: torch.Tensor, rounding: str, dtype: torch.dtype):
    rows, rounded = case.rows(table, dtype), rounding_dtype(case, rounding)
    return reference.score(case.latents, case.output, stored, case.uncond, case.scale, rows, rounded)


def reference_step(case: Case, table: TransitionTable, out: torch.dtype, rounding: str, dtype: torch.dtype):
    rows, rounded = case.rows(table, dtype), rounding_dtype(case, rounding)
    return reference.step(case.latents, case.output, case.uncond, case.scale, rows, case.noise, out, rounded)


def reference_gradient(case: Case, table: TransitionTable, rounding: str, dtype: torch.dtype, outputs: Case):
    """Gradient of the weighted log-probabilities, in the dtypes of `outputs`."""
    rows, rounded = case.rows(table, dtype), rounding_dtype(case, rounding)
    slope = -2.0 * rows[:, reference.SCALE] * rows[:, reference.B] / case.latents[0].numel() * case.weight
    operands = (case.latents, outputs.output, case.next_latents, outputs.uncond, case.scale, rows, rounded)
    return reference.gradient(*operands, slope.double(), None, None, None)


def assert_matches_reference(
    case: Case, table: TransitionTable, out: torch.dtype, rounding: str = "exact", backend: str = "cpu"
) -> None:
    """Sampling, scoring and the gradient of one backend within the budget."""
    compute = reference.compute_dtype(case.latents, case.output, case.uncond, case.next_latents)
    step = sample(case, table, rounding=rounding, backend=backend, out_dtype=out, return_denoised=True)
    truth = reference_step(case, table, F64, rounding, F64)
    plain = reference_step(case, table, out, rounding, compute)
    assert_within_budget(step.latents, truth[0], plain[0])
    assert_within_budget(step.denoised, truth[2], plain[2].to(out))
    # The log-probability is that of what was stored.
    scores = (reference_score(case, table, step.latents, rounding, dtype) for dtype in (F64, compute))
    assert_within_budget(step.log_prob, *scores)

    assert_scores(case, table, score(case, table, rounding=rounding, backend=backend), rounding)


def assert_scores(case: Case, table: TransitionTable, found: Iterable[torch.Tensor], rounding: str = "exact") -> None:
    """A log-probability and its gradients within the budget."""
    log_prob, *grads = found
    compute = reference.compute_dtype(case.latents, case.output, case.uncond, case.next_latents)
    scores = (reference_score(case, table, case.next_latents, rounding, dtype) for dtype in (F64, compute))
    assert_within_budget(log_prob, *scores)
    # The kernel reads low-precision outputs; only the truth's gradient stays in float64.
    wide = case.map(lambda t: t.double())
    narrow = reference_gradient(case, table, rounding, compute, case)
    for grad, exact, rounded in zip(grads, reference_gradient(case, table, rounding, F64, wide), narrow, strict=False):
        assert_within_budget(grad, exact, rounded)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", TABLES)
def test_every_dtype_and_sampler(dtypes: tuple, name: str) -> None:
    case = make_case((3, 5, 123), TABLES[name], dtypes)
    assert_matches_reference(case, TABLES[name], dtypes[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, BF16), (F32, F32, F64)], ids=dtype_id)
def test_every_shape(shape: tuple[int, ...], dtypes: tuple) -> None:
    assert_matches_reference(make_case(shape, TABLES["flow"], dtypes, cfg=True), TABLES["flow"], dtypes[2])


@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_guidance_rounding_and_mixed_steps(dtypes: tuple, cfg: bool, rounding: str) -> None:
    table = TABLES["mixed"]
    case = make_case((6, 3, 61), table, dtypes, cfg=cfg, step=torch.tensor([3, 1, 0, 2, 2, 1]))
    assert_matches_reference(case, table, dtypes[2], rounding)


@pytest.mark.parametrize("name", [n for n, t in TABLES.items() if t.has_reference_rounding])
@pytest.mark.parametrize("output", [BF16, F16])
def test_reference_rounding_rounds_the_two_products(name: str, output: torch.dtype) -> None:
    """Written out: the published code multiplies in the model's dtype and adds in float32."""
    table = TABLES[name]
    case = make_case((2, 77), table, (F32, output, F32))
    row = {k: getattr(table, k)[case.step].float() for k in ("a", "p", "q", "drift", "drift_weight", "denoised_weight")}
    drift, clean = (row[k] * case.output.float() for k in ("drift", "q"))
    drift, clean = drift.to(output).float(), clean.to(output).float()
    case.noise.zero_()
    step = sample(case, table, rounding="reference", return_denoised=True)
    mean = row["a"] * case.latents + row["drift_weight"] * drift + row["denoised_weight"] * clean
    assert torch.equal(step.latents, mean) and torch.equal(step.denoised, row["p"] * case.latents + clean)
    assert not torch.equal(step.latents, sample(case, table).latents)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("name", ["dance", "flow", "ddim", "vp"])
def test_identities_in_float64(name: str, cfg: bool, backend: str) -> None:
    table = TABLES[name]
    case = make_case((4, 200), table, (F64, F64, F64), cfg=cfg, step=torch.tensor([0, 1, 2, 1]))
    step = sample(case, table, backend=backend)
    tau = table.tau[case.step]
    eps = case.noise.double()
    wanted = -eps.square().mean(1) / 2 - tau.log() - 0.5 * math.log(2 * math.pi)
    assert_same_formula(step.log_prob, wanted)

    # The model moves; the log-ratio follows from the shift of the mean, without cancellation.
    moved = case.output + 1e-3 * case.reference_output
    new = transition_log_prob(case.latents, moved, step.latents, table, case.step, backend=backend, **case.guided)
    shift = (table.b[case.step] * case.scale)[:, None] * (moved - case.output)
    residual, variance = tau[:, None] * eps, 2 * tau.square()
    assert_same_formula(new - step.log_prob, (2 * residual * shift - shift.square()).mean(1) / variance)
    assert_same_formula(new - step.log_prob + shift.square().mean(1) / variance, (eps * shift).mean(1) / tau)


@pytest.mark.pairs
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_scoring_gives_the_bits_of_sampling(
    dtypes: tuple, per_sample: bool, cfg: bool, rounding: str, seeded: bool
) -> None:
    table = TABLES["flow"]
    case = make_case((4, 1031), table, dtypes, cfg=cfg, step=torch.tensor([2, 0, 3, 1]) if per_sample else 2)
    settings = {"seed": 9} if seeded else {}
    step = sample(case, table, rounding=rounding, out_dtype=dtypes[2], **settings)
    again = replace(case, next_latents=step.latents)
    again = transition_log_prob(*again.scored(table), **case.guided, rounding=rounding, backend="cpu")
    assert bits(step.log_prob) == bits(again)
    assert bool(step.log_prob.isfinite().all())


def test_log_prob_is_of_the_stored_value() -> None:
    """Scoring before rounding to bfloat16 would give the noise's own log-probability."""
    table = TABLES["dance"]
    case = make_case((2, 4096), table)
    wide, stored = sample(case, table), sample(case, table, out_dtype=BF16)
    assert torch.equal(stored.latents, wide.latents.to(BF16))
    scores = [reference_score(case, table, stored.latents, "exact", dtype) for dtype in (F64, F32)]
    assert_within_budget(stored.log_prob, *scores)
    assert not torch.equal(stored.log_prob, wide.log_prob)


def as_odd_offset(t: torch.Tensor) -> torch.Tensor:
    """Aligned to its element size only."""
    return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)


def as_slice(t: torch.Tensor) -> torch.Tensor:
    """Every second element of a larger tensor."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def as_crop(t: torch.Tensor) -> torch.Tensor:
    """Rows with a gap between them."""
    wide = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 5), math.nan)
    view = wide[..., 1:-2, 2:-3]
    view.copy_(t)
    return view


def as_trajectory_entry(t: torch.Tensor) -> torch.Tensor:
    """One step of a buffer [B, T + 1, ...]."""
    buffer = t.new_full((t.shape[0], 5, *t.shape[1:]), math.nan)
    buffer[:, 2] = t
    return buffer[:, 2]


LAYOUTS = {
    "channels last": lambda t: t.contiguous(
        memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d
    ),
    "odd offset": as_odd_offset,
    "slice": as_slice,
    "crop": as_crop,
    "trajectory": as_trajectory_entry,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "reversed dimensions": lambda t: t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))),
    "negated lazily": lambda t: t if t.dtype in (BF16, F16) else torch.complex(t, -t).conj().imag,
}


@pytest.mark.parametrize("shape", [(2, 4, 9, 70), (2, 4, 3, 6, 17)], ids=["image", "video"])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F16, BF16), (F64, F64, F64)], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(shape: tuple[int, ...], dtypes: tuple, layout: str) -> None:
    table = TABLES["mixed"]
    case = make_case(shape, table, dtypes, cfg=True, step=torch.tensor([1, 0]))
    strided = case.map(LAYOUTS[layout])
    assert_same_bits(everything(strided, table), everything(case, table))


@pytest.mark.parametrize("dims", [(0,), (1,), (3,), (1, 2, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16)], ids=dtype_id)
def test_expanded_inputs(dims: tuple[int, ...], dtypes: tuple) -> None:
    table, shape = TABLES["flow"], (2, 4, 9, 17)
    kept = tuple(slice(0, 1) if d in dims else slice(None) for d in range(4))
    case = make_case(shape, table, dtypes, cfg=True).map(lambda t: t[kept].expand(shape))
    assert case.latents.stride(dims[0]) == 0
    assert_same_bits(everything(case, table), everything(case.map(torch.Tensor.contiguous), table))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("layout", ["slice", "crop", "trajectory", "transposed", "batch last", "odd offset"])
def test_out_is_filled_and_nothing_around_it(layout: str, out_dtype: torch.dtype, backend: str) -> None:
    table = TABLES["flow"]
    case = make_case((2, 3, 9, 70), table)
    out = LAYOUTS[layout](torch.full(case.latents.shape, math.nan, dtype=out_dtype))
    storage = torch.empty(0, dtype=out_dtype).set_(out.untyped_storage())
    storage.fill_(-7.0)
    out.fill_(math.nan)
    wanted = sample(case, table, out_dtype=out_dtype, backend=backend)
    step = sample(case, table, out=out, backend=backend)
    assert step.latents is out and torch.equal(out, wanted.latents)
    assert bits(step.log_prob) == bits(wanted.log_prob)
    out.fill_(-7.0)
    assert torch.equal(storage, torch.full_like(storage, -7.0))


def test_out_of_one_dtype_decides_the_storage() -> None:
    table = TABLES["flow"]
    case = make_case((2, 30), table)
    assert sample(case, table, out=torch.empty(2, 30, dtype=BF16), return_denoised=True).denoised.dtype == BF16
    assert sample(case, table).latents.dtype == F32 and sample(case, table).denoised is None


def test_version_counter_sees_the_write() -> None:
    """Autograd must notice that a saved tensor was overwritten."""
    table = TABLES["flow"]
    case = make_case((2, 30), table)
    out = torch.zeros(2, 30)
    leaf = torch.ones(2, 30, requires_grad=True)
    product = leaf * out
    with torch.no_grad():
        sample(case, table, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_from_generators(backend: str) -> None:
    table = TABLES["flow"]
    case = make_case((2, 30), table)

    def drawn(noise: torch.Generator | torch.Tensor | None) -> torch.Tensor:
        return transition_step(case.latents, case.output, table, 1, noise=noise, backend=backend).latents

    given = drawn(torch.randn((2, 30), generator=torch.Generator().manual_seed(3)))
    assert torch.equal(drawn(torch.Generator().manual_seed(3)), given)
    torch.manual_seed(3)
    assert torch.equal(drawn(None), given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_dimensional_step(backend: str) -> None:
    table = TABLES["flow"]
    for step in range(STEPS):
        case = make_case((2, 30), table, step=step)
        wanted = sample(case, table, backend=backend)
        found = sample(replace(case, step=torch.tensor(step)), table, backend=backend)
        assert torch.equal(found.latents, wanted.latents) and torch.equal(found.log_prob, wanted.log_prob)
