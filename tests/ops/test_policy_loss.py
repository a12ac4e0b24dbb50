"""`policy_loss` against the definition in float64, against plain autograd, and at its edges."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import PolicyMetrics, policy_loss, transition_log_prob
from dancegrpo_fast.kernels.policy_loss import reference
from dancegrpo_fast.kernels.transition import reference as transition
from dancegrpo_fast.transitions import TransitionTable

from ..tolerances import assert_same_formula, assert_within_budget
from .cases import BACKENDS, BF16, DTYPES, F32, F64, SHAPES, TABLES, Case, dtype_id, make_case, train

OPTIONS = {
    "plain": {},
    "kl": {"kl": True},
    "norm": {"ratio_norm": True},
    "everything": {"kl": True, "ratio_norm": True, "clip_range": (0.05, 0.002), "advantage_clip": 2.0},
    "no limit": {"advantage_clip": math.inf},
}
PER_SAMPLE = torch.tensor([3, 1, 0, 2, 2, 1, 1, 2, 1])


def options_for(table: TransitionTable) -> list[str]:
    if table.is_deterministic:
        return []
    return [name for name, o in OPTIONS.items() if table.has_step_size or not o.get("ratio_norm")]


def reference_loss(
    case: Case, table: TransitionTable, dtype: torch.dtype, outputs: Case, **options
) -> dict[str, Tensor]:
    """The definition evaluated in `dtype`; gradients in the dtypes of `outputs`."""
    rounding = options.pop("rounding", "exact")
    kl, norm = options.pop("kl", False), options.get("ratio_norm", False)
    rounded = None if rounding == "exact" else case.output.dtype if case.uncond is None else F64
    shared = (case.next_latents, outputs.uncond, case.scale, case.rows(table, dtype), rounded)
    pulls = (case.reference_output if kl else None, case.old_output if norm else None)
    numbers = (t.to(dtype) for t in (case.old_log_prob, case.advantages, case.weight))
    limits = (*options.get("clip_range", (1e-4, 1e-4)), options.get("advantage_clip", 5.0))
    terms = reference.policy_loss(
        case.latents, outputs.output, *shared, *numbers, *pulls, *limits, 0.1 if kl else 0.0, norm
    )
    scales = (terms.step_scale, terms.pull_scale if kl else None)
    grads = transition.gradient(case.latents, outputs.output, *shared, *scales, *pulls)
    found = {"loss": terms.loss, "log_prob": terms.log_prob, "ratio": terms.ratio, "grad": grads[0]}
    found |= {} if grads[1] is None else {"grad_uncond": grads[1]}
    found |= {f"metrics.{name}": terms.metrics[i] for i, name in enumerate(PolicyMetrics._fields)}
    return found


def assert_matches_reference(cases: list[Case], table: TransitionTable, train: Callable = train, **options) -> None:
    """Several draws together, because plain torch may be right by luck in a single number."""
    found, truth, plain = [], [], []
    for case in cases:
        compute = transition.compute_dtype(case.latents, case.output, case.uncond, case.next_latents)
        found.append(train(case, table, **options))
        truth.append(reference_loss(case, table, F64, case.map(lambda t: t.double()), **options))
        plain.append(reference_loss(case, table, compute, case, **options))
        assert found[-1].pop("has_grad").dtype == torch.bool
    assert found[0].keys() == truth[0].keys()
    joined = {name: [torch.stack([r[name] for r in results]) for results in (found, truth, plain)] for name in found[0]}
    _, exact, rounded = joined["ratio"]
    # The largest deviation is one sample's, and d(rho - 1 - log rho) = (1 - 1 / rho) d(rho).
    error = float((rounded.double() - exact).abs().max())
    source = {"metrics.ratio_max_dev": error, "metrics.approx_kl": error * float((1 - 1 / exact).abs().max())}
    # A loss is a mean of ratios, each times its weight and advantage.
    source["loss"] = error * max(float((case.weight * case.advantages).abs().mean()) for case in cases)
    for name, values in joined.items():
        assert_within_budget(*values, source.get(name, 0.0))


def draws(*arguments, **settings) -> list[Case]:
    return [make_case(*arguments, seed=seed, **settings) for seed in range(4)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("name", "option"), [(n, o) for n, t in TABLES.items() for o in options_for(t)])
def test_every_dtype_sampler_and_option(dtypes: tuple, name: str, option: str) -> None:
    cases = draws((9, 3, 123), TABLES[name], dtypes)
    assert_matches_reference(cases, TABLES[name], **OPTIONS[option])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16)], ids=dtype_id)
def test_every_shape(shape: tuple[int, ...], dtypes: tuple) -> None:
    cases = draws(shape, TABLES["flow"], dtypes, cfg=True)
    assert_matches_reference(cases, TABLES["flow"], **OPTIONS["everything"])


@pytest.mark.pairs
@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=dtype_id)
def test_guidance_rounding_and_mixed_steps(dtypes: tuple, option: str, cfg: bool, rounding: str) -> None:
    cases = draws((9, 3, 61), TABLES["mixed"], dtypes, cfg=cfg, step=PER_SAMPLE)
    assert_matches_reference(cases, TABLES["mixed"], rounding=rounding, **OPTIONS[option])


def plain_autograd(case: Case, table: TransitionTable, option: str) -> tuple[Tensor, list[Tensor]]:
    """The objective as it is written in papers, differentiated by torch."""
    settings = {"clip_range": (1e-4, 1e-4), "advantage_clip": 5.0, "kl": False, "ratio_norm": False, **OPTIONS[option]}
    leaves = [t.clone().requires_grad_() for t in (case.output, case.uncond) if t is not None]
    v = leaves[0] if case.uncond is None else leaves[1] + case.guidance * (leaves[0] - leaves[1])
    steps = case.step if isinstance(case.step, Tensor) else torch.full((len(case.latents),), case.step)
    shape = (-1, *(1,) * (case.latents.ndim - 1))
    a, b, tau = (getattr(table, name)[steps] for name in ("a", "b", "tau"))

    def mean_of(output: Tensor) -> Tensor:
        return a.reshape(shape) * case.latents + b.reshape(shape) * output

    def average(values: Tensor) -> Tensor:
        return values.flatten(1).mean(1)

    square = average((case.next_latents - mean_of(v)).square())
    gaussian = torch.tensor([table.kind[i] == "gaussian" for i in steps.tolist()]) & (tau > 0)
    quadratic = torch.tensor([table.kind[i] == "quadratic" for i in steps.tolist()]) & (tau > 0)
    safe = torch.where(tau > 0, tau, 1.0)
    normal = -square / (2 * safe**2) - safe.log() - 0.5 * math.log(2 * math.pi)
    log_prob = torch.where(gaussian, normal, torch.where(quadratic, -square, 0.0 * square))
    # Half the inverse variance; the quadratic score has that of variance 1/2.
    precision = torch.where(gaussian, 0.5 / safe**2, quadratic.double())
    log_ratio, divisor = log_prob - case.old_log_prob, torch.ones_like(log_prob)
    if settings["ratio_norm"]:
        moved = average((mean_of(v) - mean_of(case.old_output)).square())
        # The correction is a constant for the gradient.
        log_ratio = (log_ratio + precision * moved) * tau
        divisor = table.step_size[steps]
    rho = log_ratio.exp()
    limit, (low, high) = settings["advantage_clip"], settings["clip_range"]
    advantage = case.advantages.clamp(-limit, limit)
    loss = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - low, 1 + high)) / divisor
    if settings["kl"]:
        loss = loss + 0.1 * precision * average((mean_of(v) - mean_of(case.reference_output)).square())
    total = (case.weight * loss).mean()
    total.backward()
    return total.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize(("name", "option"), [(n, o) for n, t in TABLES.items() for o in options_for(t)])
def test_against_plain_autograd(name: str, option: str, cfg: bool, backend: str) -> None:
    step = PER_SAMPLE if name == "mixed" else 1
    case = make_case((9, 5, 7), TABLES[name], (F64, F64, F64), cfg=cfg, step=step)
    loss, grads = plain_autograd(case, TABLES[name], option)
    found = train(case, TABLES[name], backend=backend, **OPTIONS[option])
    assert_same_formula(found["loss"], loss)
    for mine, wanted in zip((found["grad"], found.get("grad_uncond")), [*grads, None], strict=False):
        if wanted is not None:
            assert_same_formula(mine, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck_of_the_log_prob(name: str, cfg: bool, per_sample: bool, backend: str) -> None:
    step = torch.tensor([2, 1, 0]) if per_sample else 1
    case = make_case((3, 2, 3), TABLES[name], (F64, F64, F64), cfg=cfg, step=step)

    def run(output: Tensor, uncond: Tensor | None) -> Tensor:
        guided = case.guided | {"uncond_output": uncond}
        return transition_log_prob(*case.scored(TABLES[name], output), backend=backend, **guided)

    assert torch.autograd.gradcheck(run, case.leaves())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize(("name", "option"), [(n, o) for n in ("mixed", "cps", "ddim") for o in options_for(TABLES[n])])
def test_gradcheck_of_the_loss(name: str, option: str, cfg: bool, backend: str) -> None:
    step = torch.tensor([2, 1, 0, 1, 2, 3])
    case = make_case((6, 2, 2), TABLES[name], (F64, F64, F64), cfg=cfg, step=step)
    options = dict(OPTIONS[option])
    kl = {"reference_output": case.reference_output, "kl_weight": 0.1} if options.pop("kl", False) else {}
    old = {"old_output": case.old_output} if options.get("ratio_norm") else {}

    settings = {"weight": case.weight, "backend": backend} | kl | old | options

    def run(output: Tensor, uncond: Tensor | None) -> Tensor:
        guided = case.guided | {"uncond_output": uncond}
        return policy_loss(*case.lost(TABLES[name], output), **guided, **settings).loss

    # A finite difference must not step over the clip.
    assert torch.autograd.gradcheck(run, case.leaves(), eps=1e-7, nondet_tol=0.0)
