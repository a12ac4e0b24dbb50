"""The policy loss by Triton against the definition and against the C++ kernel.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import policy_loss
from dancegrpo_fast.kernels.transition import reference
from dancegrpo_fast.ops import _triton
from dancegrpo_fast.ops._call import GradientTerms, LossOutputs, Objective, Transition

from ..ops import test_policy_loss
from ..ops import test_policy_loss_edges as edges
from ..ops import test_policy_loss_terms as terms
from ..ops.cases import BF16, DTYPES, F16, F32, F64, TABLES, bits, dtype_id, make_case, train
from ..release import release_but

FLOAT32 = tuple(dtypes for dtypes in DTYPES if F64 not in dtypes)
FEW = (F32, BF16, F32), (BF16, BF16, BF16), (F16, F16, F16)
BLOCK = _triton.BLOCK
OPTIONS = test_policy_loss.OPTIONS


@pytest.mark.parametrize(
    "name", release_but(("cps",), [name for name, table in TABLES.items() if not table.is_deterministic])
)
def test_every_sampler(name: str) -> None:
    table = TABLES[name]
    option = "everything" if table.has_step_size else "kl"
    cases = [make_case((9, 3, 41), table, (F32, BF16, F32), seed=seed) for seed in range(2)]
    test_policy_loss.assert_matches_reference(cases, table, backend="triton", **OPTIONS[option])


@pytest.mark.parametrize("option", release_but(("plain", "norm", "everything"), OPTIONS))
@pytest.mark.parametrize("rounding", release_but(("exact",), ["exact", "reference"]))
def test_options_guidance_rounding_and_mixed_steps(rounding: str, option: str) -> None:
    table, step = TABLES["mixed"], test_policy_loss.PER_SAMPLE
    settings = {"cfg": rounding == "exact", "step": step}
    cases = [make_case((9, 3, 41), table, (F32, BF16, F32), seed=seed, **settings) for seed in range(2)]
    test_policy_loss.assert_matches_reference(cases, table, backend="triton", rounding=rounding, **OPTIONS[option])


@pytest.mark.parametrize("dtypes", release_but(FEW[1:2], FLOAT32), ids=dtype_id)
def test_every_dtype(dtypes: tuple) -> None:
    cases = [make_case((9, 3, 41), TABLES["flow"], dtypes, seed=seed) for seed in range(2)]
    test_policy_loss.assert_matches_reference(cases, TABLES["flow"], backend="triton", **OPTIONS["everything"])


@pytest.mark.parametrize(
    "shape",
    release_but(((3, 1), (3, BLOCK + 1)), [(3, 1), (2, BLOCK - 1), (3, BLOCK + 1), (1, 3 * BLOCK), (35, 2)]),
    ids=str,
)
def test_every_shape(shape: tuple[int, ...]) -> None:
    cases = [make_case(shape, TABLES["flow"], (F32, BF16, F32), cfg=True, seed=seed) for seed in range(2)]
    test_policy_loss.assert_matches_reference(cases, TABLES["flow"], backend="triton", **OPTIONS["everything"])


@pytest.mark.parametrize(
    "dtypes", release_but(((BF16, BF16, BF16),), [(F32, F32, F32), (BF16, BF16, BF16)]), ids=dtype_id
)
def test_decisions_are_those_of_the_cpu_kernel(dtypes: tuple) -> None:
    """Who is clipped, and the shape of everything."""
    case = make_case((16, 600), TABLES["flow"], dtypes, cfg=True)
    mine, wanted = (train(case, TABLES["flow"], kl=True, backend=backend) for backend in ("triton", "cpu"))
    for name in ("has_grad", "metrics.samples", "metrics.clip_fraction", "metrics.advantage_clip_fraction"):
        assert bits(mine[name]) == bits(wanted[name]), name
    assert {n: (t.dtype, t.shape) for n, t in mine.items()} == {n: (t.dtype, t.shape) for n, t in wanted.items()}


def test_no_weights_are_weights_of_one() -> None:
    case = make_case((3, 50), TABLES["flow"])
    none, ones = (
        policy_loss(*case.lost(TABLES["flow"]), weight=weight, backend="triton") for weight in (1.0, torch.ones(3))
    )
    assert bits(none.loss) == bits(ones.loss) and bits(none.ratio) == bits(ones.ratio)


# Tests of the other backends that hold as they are.
SHARED: list[tuple[Callable[..., None], tuple]] = [
    *((edges.test_clipped_samples_have_exactly_no_gradient, (dtype,)) for dtype in (F32, BF16, F16)),
    *((edges.test_weight_zero_leaves_a_sample_out, (option,)) for option in ({}, {"kl": True}, {"ratio_norm": True})),
    *((terms.test_samples_of_weight_zero_may_hold_anything, ("plain", value)) for value in (math.inf, -math.inf)),
    (edges.test_weight_zero_everywhere, ()),
    (edges.test_only_the_conditional_output_may_need_a_gradient, ()),
    (edges.test_only_the_loss_and_the_outputs_are_differentiable, ()),
    *((terms.test_the_largest_deviation_keeps_nan, (place,)) for place in range(3)),
    *(
        (terms.test_an_advantage_of_zero_is_zero_beside_an_overflown_ratio, given)
        for given in itertools.product((math.inf, 1e5), (0.0, -0.0))
    ),
    (terms.test_one_number_is_both_sides, ()),
]
FIRST = dict(reversed(SHARED))
CASES = [one if FIRST[one[0]] == one[1] else pytest.param(*one, marks=pytest.mark.release) for one in SHARED]


@pytest.mark.parametrize(("test", "arguments"), CASES, ids=lambda each: getattr(each, "__name__", None) or str(each))
def test_as_on_the_cpu(test: Callable[..., None], arguments: tuple) -> None:
    test(*arguments, "triton")


def run(log_ratios: list[float], advantages: list[float], **settings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss, ratio, metrics and gradient with given log-ratios, by Triton and by the C++ kernel."""
    case, old, given = edges.ratio_case(log_ratios, advantages, F32)
    found = []
    for backend in ("triton", "cpu"):
        result, grad = edges.run(case, old, given, backend=backend, **settings)
        values = {"loss": result.loss, "ratio": result.ratio, "has_grad": result.has_grad, "grad": grad}
        found.append(values | result.metrics._asdict())
    return found[0], found[1]


@pytest.mark.parametrize(
    ("log_ratio", "advantage"),
    [
        *((math.inf, advantage) for advantage in (1.0, -1.0, 0.0)),
        *((-math.inf, advantage) for advantage in (1.0, -1.0)),
        *((math.nan, 1.0), (0.0, math.nan), (200.0, 1.0), (-200.0, -1.0)),
    ],
)
def test_values_that_are_not_finite(log_ratio: float, advantage: float) -> None:
    """What overflows or is NaN does so as in the C++ kernel, and stays out of the other sample."""
    mine, wanted = run([log_ratio, 0.0], [advantage, 1.0])
    for name, value in mine.items():
        assert torch.equal(value.isnan(), wanted[name].isnan()), name
        assert torch.equal(value.isinf(), wanted[name].isinf()), name
    assert torch.equal(mine["has_grad"], wanted["has_grad"]) and torch.equal(mine["grad"][1], wanted["grad"][1])


@pytest.mark.parametrize("value", release_but((math.nan,), [terms.HUGE, math.nan]))
@pytest.mark.parametrize("option", release_but(("kl",), ["kl", "norm"]))
def test_terms_of_weight_zero_count_nothing(option: str, value: float) -> None:
    terms.test_rows_without_noise_may_hold_anything_with_weight_zero(option, value, "triton")
    terms.test_samples_of_weight_zero_may_hold_anything(option, value, "triton")
    terms.test_a_kl_of_weight_zero_is_a_metric_only(value, "triton")


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_rows_without_noise_are_poison_unless_left_out(advantage: float) -> None:
    """As for indices outside the table: a GPU's steps cannot be looked at without waiting."""
    steps = terms.STEPS
    case = make_case((5, 40), TABLES["mixed"], step=steps)
    case.advantages.fill_(advantage)
    result, grad = terms.run(case, weight=torch.ones(5), backend="triton")
    missing = [row in TABLES["mixed"].unscored for row in steps.tolist()]
    assert bool(result.loss.isnan()) and result.ratio.isnan().tolist() == grad.isnan().all(1).tolist() == missing
    with pytest.raises(ValueError, match=r"^step: got 0, a row without noise"):
        terms.run(make_case((5, 40), TABLES["mixed"], step=0), weight=1.0, backend="triton")


@pytest.mark.parametrize(
    "clip_range", release_but((2e-6,), [0.0, 2e-6, 1e-4, 1.0, (2e-6, 1e-6), (0.0, 1e-6), (1e-6, 0.0)])
)
def test_clip_by_ranges_down_to_millionths(clip_range: float | tuple[float, float]) -> None:
    """A bound of 1 + 2e-6 is not a float32; it must not be rounded to one before the comparison."""
    log_ratios = [k * 2.0**-22 for k in range(-12, 13)]
    mine, wanted = run(log_ratios, [1.0, -1.0] * 12 + [1.0], clip_range=clip_range)
    for name in ("has_grad", "clip_fraction", "ratio"):
        assert bits(mine[name]) == bits(wanted[name]), name


def guarded(shape: tuple[int, ...], dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """A tensor of sevens in the middle of a longer one."""
    count, band = math.prod(shape), 64
    whole = torch.full((count + 2 * band,), 7, dtype=torch.uint8 if dtype == torch.bool else dtype)
    return whole.view(dtype)[band : band + count].view(shape), whole


@pytest.mark.parametrize("numel", [3, BLOCK + 40])
def test_outputs_are_filled_and_nothing_around_them(numel: int) -> None:
    batch = 3
    case = make_case((batch, numel), TABLES["flow"], (F32, BF16, F32), cfg=True)
    table = TABLES["flow"].packed(torch.device("cpu"), F32)
    shared = (case.latents, case.output, case.next_latents, case.uncond, case.guidance, table, None, 1, False)
    call = Transition(*shared, "triton")
    shapes = LossOutputs((), (batch,), (batch,), (8,), (batch,), (batch,), (batch,))
    buffers = [guarded(shape, torch.bool if i == 4 else F32) for i, shape in enumerate(shapes)]
    grads = [guarded((batch, numel), BF16) for _ in range(2)]
    per_sample = (case.old_log_prob, case.advantages, case.weight)
    objective = Objective(*per_sample, case.reference_output, None, 1e-4, 2e-4, 5.0, 0.1, False)
    out = LossOutputs(*(view for view, _ in buffers))
    _triton.policy_loss(call, objective, out)
    of = GradientTerms(torch.ones(()), out.step_scale, out.pull_scale, case.reference_output, None)
    _triton.policy_loss_gradient(call, of, *(view for view, _ in grads))
    for view, whole in [*buffers, *grads]:
        assert view.dtype == torch.bool or not bool((view == 7).any())
        view.fill_(True) if view.dtype == torch.bool else view.fill_(7)
        whole[64 : 64 + view.numel()] = 7
        assert bool((whole == 7).all())


def test_steps_outside_the_table_are_poison_unless_left_out() -> None:
    table = TABLES["flow"]
    case = make_case((4, 40), table)
    bad = torch.tensor([1, 4, -1, 3])

    def loss(weight: Tensor):
        leaf = case.output.clone().requires_grad_()
        arguments = (case.next_latents, table, bad, case.old_log_prob, case.advantages)
        result = policy_loss(case.latents, leaf, *arguments, weight=weight, clip_range=10.0, backend="triton")
        result.loss.backward()
        return result, leaf.grad

    result, grad = loss(torch.ones(4))
    assert bool(result.loss.isnan()) and result.ratio.isnan().tolist() == [False, True, True, False]
    assert bool(grad[1:3].isnan().all()) and bool(grad[[0, 3]].isfinite().all())
    result, grad = loss(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert bool(result.loss.isfinite()) and bool(grad[[0, 3]].isfinite().all())


def test_gradient_of_a_clipped_sample_reads_nothing() -> None:
    """Its scale is 0: NaN in everything it holds stays out of the zeros that are written."""
    case = make_case((2, BLOCK + 9), TABLES["flow"], cfg=True)
    table = TABLES["flow"].packed(torch.device("cpu"), reference.compute_dtype(case.latents))
    poisoned = case.map(lambda t: torch.cat([torch.full_like(t[:1], math.nan), t[1:]]))
    scale = torch.tensor([0.0, 0.5])
    grads = [torch.full_like(case.output, math.nan) for _ in range(2)]
    shared = (poisoned.latents, poisoned.output, poisoned.next_latents, poisoned.uncond, case.guidance, table, None)
    of = GradientTerms(torch.ones(()), scale, scale, poisoned.reference_output, poisoned.old_output)
    _triton.policy_loss_gradient(Transition(*shared, 1, False, "triton"), of, *grads)
    assert all(bool((grad[0] == 0).all()) and bool(grad[1].isfinite().all()) for grad in grads)
