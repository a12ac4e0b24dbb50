"""What does not count in `policy_loss` never spoils it, what cannot count is refused, and ranges of the clip."""

import math

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import PolicyLoss, policy_loss
from dancegrpo_fast.kernels.policy_loss import reference
from dancegrpo_fast.transitions import TransitionTable, ode, shifted_sigmas

from ..tolerances import assert_same_formula
from .cases import BACKENDS, F32, F64, TABLES, Case, bits, make_case
from .test_policy_loss_edges import ratio_case
from .test_policy_loss_edges import run as run_flow

MIXED = TABLES["mixed"]
# Rows 0 and 3 of the table add no noise.
STEPS = torch.tensor([1, 0, 2, 3, 1])
NOISELESS = [1, 3]
NOISY = [0, 2, 4]
# Squares of differences this large pass float32.
HUGE = 1e25


def run(case: Case, table: TransitionTable = MIXED, **settings) -> tuple[PolicyLoss, Tensor]:
    leaf = case.output.detach().clone().requires_grad_()
    result = policy_loss(*case.lost(table, leaf), **{"weight": case.weight, "clip_range": 10.0, **settings})
    result.loss.backward()
    return result, leaf.grad


def pulls(case: Case, option: str) -> dict:
    """Settings of a KL, of RatioNorm, or of none."""
    return {
        "plain": {},
        "kl": {"reference_output": case.reference_output, "kl_weight": 0.1},
        "norm": {"ratio_norm": True, "old_output": case.old_output},
    }[option]


def assert_same_but(samples: list[int], found: tuple[PolicyLoss, Tensor], clean: tuple[PolicyLoss, Tensor]) -> None:
    """Loss, metrics and gradients bit for bit, and exactly no gradient for `samples`."""
    (result, grad), (wanted, wanted_grad) = found, clean
    assert bits(result.loss.detach()) == bits(wanted.loss.detach()) and bool(result.loss.isfinite())
    assert bits(result.metrics.values) == bits(wanted.metrics.values)
    others = [i for i in range(len(grad)) if i not in samples]
    assert bits(grad[others]) == bits(wanted_grad[others]) and bool((grad[others] != 0).any())
    assert bool((grad[samples] == 0).all()) and not bool(result.has_grad[samples].any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [HUGE, -HUGE, math.inf, math.nan])
@pytest.mark.parametrize("option", ["plain", "kl", "norm"])
def test_rows_without_noise_may_hold_anything_with_weight_zero(option: str, value: float, backend: str) -> None:
    """Steps of an ODE in a mixed batch: padding of a window of noise."""
    case = make_case((5, 60), MIXED, step=STEPS)
    assert case.weight.eq(0).nonzero().flatten().tolist() == NOISELESS
    clean = run(case, backend=backend, **pulls(case, option))
    where = torch.tensor([i in NOISELESS for i in range(5)])[:, None] & (torch.arange(60) % 3 == 0)
    for name in ("latents", "output", "next_latents", "reference_output", "old_output"):
        spoiled = case.map(lambda t: torch.where(where, value, t) if t is getattr(case, name) else t)  # noqa: B023
        assert_same_but(NOISELESS, run(spoiled, backend=backend, **pulls(spoiled, option)), clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [HUGE, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("option", ["plain", "kl", "norm"])
def test_samples_of_weight_zero_may_hold_anything(option: str, value: float, backend: str) -> None:
    table = TABLES["flow"]
    case = make_case((4, 60), table)
    case.weight[2] = 0.0
    clean = run(case, table, backend=backend, **pulls(case, option))
    spoiled = case.map(lambda t: torch.where(torch.arange(4)[:, None] == 2, value, t))
    spoiled.old_log_prob[2] = spoiled.advantages[2] = value
    assert_same_but([2], run(spoiled, table, backend=backend, **pulls(spoiled, option)), clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [HUGE, math.inf, math.nan])
def test_a_kl_of_weight_zero_is_a_metric_only(value: float, backend: str) -> None:
    """The metric says what the reference output holds, the loss and the gradient do not know it."""
    table = TABLES["flow"]
    case = make_case((4, 60), table)
    case.reference_output[1, 5] = value
    clean, grad = run(case, table, backend=backend)
    found, found_grad = run(case, table, reference_output=case.reference_output, backend=backend)
    assert bits(found.loss.detach()) == bits(clean.loss.detach()) and bits(found_grad) == bits(grad)
    assert not bool(found.metrics.reference_kl.isfinite()) and torch.equal(found.has_grad, clean.has_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_rows_without_noise_are_refused_where_they_count(advantage: float, backend: str) -> None:
    case = make_case((5, 60), MIXED, step=STEPS)
    case.advantages.fill_(advantage)
    for weight in (1.0, torch.ones(5), case.weight.where(torch.arange(5) != 1, -0.5)):
        with pytest.raises(ValueError, match=r"^step: got 0, a row without noise"):
            run(case, weight=weight, backend=backend)
    for step in (0, 3):
        fixed = make_case((5, 60), MIXED, step=step)
        for weight in (1.0, torch.ones(5)):
            with pytest.raises(ValueError, match=rf"^step: got {step}, a row without noise"):
                run(fixed, weight=weight, backend=backend)
        result, grad = run(fixed, weight=0.0, backend=backend)
        assert result.loss == 0 and bool((grad == 0).all()) and not result.has_grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [0, torch.zeros(3, dtype=torch.int64)])
def test_tables_without_noise_are_refused(step: int | Tensor, backend: str) -> None:
    table = ode((1.0, 0.5))
    case = make_case((3, 50), table, step=step)
    with pytest.raises(ValueError, match=r"^table: got one without noise"):
        run(case, table, weight=1.0, backend=backend)
    for weight in (0.0, torch.zeros(3)):
        result, grad = run(case, table, weight=weight, backend=backend)
        assert result.loss == 0 and bool((grad == 0).all()) and result.metrics.samples == 0


@pytest.mark.parametrize("dtype", [F32, F64])
def test_rows_without_noise_are_nan_in_the_definition(dtype: torch.dtype) -> None:
    """What a GPU gives, where nothing can be raised; an advantage of 0 or a KL does not hide it."""
    case = make_case((5, 60), MIXED, (dtype, dtype, dtype), step=STEPS)
    rows = case.rows(MIXED, dtype)
    advantages = torch.zeros(5, dtype=dtype)
    for weight, missing in ((torch.ones(5, dtype=dtype), NOISELESS), (case.weight, [])):
        terms = reference.policy_loss(
            *(case.latents, case.output, case.next_latents, None, 1.0, rows, None),
            *(case.old_log_prob, advantages, weight, case.reference_output, None, 0.1, 0.1, 5.0, 0.1, False),
        )
        assert terms.ratio.isnan().nonzero().flatten().tolist() == missing
        assert terms.step_scale.isnan().nonzero().flatten().tolist() == missing
        assert bool(terms.loss.isnan()) == bool(missing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(3))
def test_the_largest_deviation_keeps_nan(place: int, backend: str) -> None:
    """A metric of exactness that forgot a NaN would say 0."""
    for others in (0.0, 0.3):
        log_ratios = [others] * 3
        log_ratios[place] = math.nan
        result, _ = run_flow(*ratio_case(log_ratios, [1.0, 1.0, 1.0], F32), backend=backend)
        assert bool(result.metrics.ratio_max_dev.isnan()) and result.metrics.samples == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [math.inf, 1e5])
@pytest.mark.parametrize("advantage", [0.0, -0.0])
def test_an_advantage_of_zero_is_zero_beside_an_overflown_ratio(ratio: float, advantage: float, backend: str) -> None:
    case, old, given = ratio_case([ratio, 0.1], [advantage, -1.0], F32)
    result, grad = run_flow(case, old, given, backend=backend)
    alone, alone_grad = run_flow(case.select([1]), old[1:], given[1:], backend=backend)
    assert bool(result.ratio[0].isinf())
    assert result.loss == alone.loss / 2 and torch.equal(grad[1], alone_grad[0] / 2)
    assert bool((grad[0] == 0).all()) and result.has_grad.tolist() == [False, True]
    assert result.metrics.policy_loss == alone.metrics.policy_loss / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip_range", [(0.2, 0.28), (0.28, 0.2), (0.0, 0.2), (0.2, 0.0), (0.1, math.inf), [0.2, 0.3]])
def test_clip_higher_is_the_published_formula(clip_range: tuple[float, float], backend: str) -> None:
    """DAPO's, as verl writes it: two losses, the larger one."""
    low, high = clip_range
    log_ratios = [math.log(r) for r in (0.7, 0.75, 0.92, 1.0, 1.13, 1.22, 1.27, 1.35)] * 2
    case, old, given = ratio_case(log_ratios, [1.5] * 8 + [-0.5] * 8)
    result, grad = run_flow(case, old, given, clip_range=clip_range, backend=backend)
    ratio = torch.tensor(log_ratios, dtype=F64).exp()
    plain, bounded = -given * ratio, -given * torch.clamp(ratio, 1 - low, 1 + high)
    assert_same_formula(result.loss.detach(), torch.maximum(plain, bounded).mean())
    assert result.metrics.clip_fraction == (bounded > plain).double().mean()
    assert result.has_grad.tolist() == (bounded <= plain).tolist() == (grad != 0).any(1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_number_is_both_sides(backend: str) -> None:
    case, old, given = ratio_case([0.0, 0.01, -0.01, 0.3, -0.3], [1.0, -1.0, 1.0, 1.0, -1.0], F32)
    both, grad = run_flow(case, old, given, clip_range=0.05, backend=backend)
    pair, pair_grad = run_flow(case, old, given, clip_range=(0.05, 0.05), backend=backend)
    assert bits(both.loss.detach()) == bits(pair.loss.detach()) and bits(grad) == bits(pair_grad)
    assert bits(both.metrics.values) == bits(pair.metrics.values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kl_is_flow_grpo_s_over_the_step_size(backend: str) -> None:
    """Theirs divides by the variance without the step size: `kl_weight = beta (-dt)`."""
    sigmas, level, table = shifted_sigmas(4, 3.0), 0.7, TABLES["flow"]
    case = make_case((3, 50), table, (F64, F64, F64))
    s, dt = sigmas[1], sigmas[2] - sigmas[1]
    std = torch.sqrt(s / (1 - s)) * level

    def mean_of(output: Tensor) -> Tensor:
        return case.latents * (1 + std**2 / (2 * s) * dt) + output * (1 + std**2 * (1 - s) / (2 * s)) * dt

    theirs = (mean_of(case.output) - mean_of(case.reference_output)).square().mean(1) / (2 * std**2)
    settings = {"advantage_clip": 0.0, "weight": 1.0, "reference_output": case.reference_output, "backend": backend}
    result, _ = run(case, table, kl_weight=float(-dt) * 0.04, **settings)
    assert_same_formula(result.loss.detach(), 0.04 * theirs.mean())
