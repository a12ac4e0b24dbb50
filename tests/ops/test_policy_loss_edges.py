"""Where `policy_loss` has no gradient, what it then must not read, and what its metrics count."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dancegrpo_fast import PolicyLoss, PolicyMetrics, policy_loss, transition_log_prob
from dancegrpo_fast.kernels.transition import reference

from ..tolerances import assert_same_formula
from .cases import BACKENDS, BF16, F16, F32, F64, TABLES, Case, make_case, train

DTYPES = (F32, BF16, F16, F64)


def ratio_case(log_ratios: list[float], advantages: list[float], dtype: torch.dtype = F64, numel: int = 40):
    """Samples whose log-ratios and advantages are these."""
    case = make_case((len(log_ratios), numel), TABLES["flow"], (dtype, dtype, dtype))
    now = transition_log_prob(*case.scored(TABLES["flow"]))
    old = now.double() - torch.tensor(log_ratios, dtype=F64)
    return case, old.to(now.dtype), torch.tensor(advantages, dtype=now.dtype)


def run(case, old: Tensor, advantages: Tensor, **settings) -> tuple[PolicyLoss, Tensor]:
    leaf = case.output.detach().clone().requires_grad_()
    result = policy_loss(*case.scored(TABLES["flow"], leaf), old, advantages, **settings)
    result.loss.backward()
    return result, leaf.grad


# log-ratio, advantage, whether max(-A rho, -A clip(rho)) takes the clipped side
CLIPPING = (
    (0.0, 1.0, False),
    (0.0, -1.0, False),
    (0.1, 1.0, True),
    (0.1, -1.0, False),
    (-0.1, 1.0, False),
    (-0.1, -1.0, True),
    (0.1, 0.0, False),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_samples_have_exactly_no_gradient(dtype: torch.dtype, backend: str) -> None:
    log_ratios, advantages, clipped = (list(values) for values in zip(*CLIPPING, strict=True))
    case, old, given = ratio_case(log_ratios, advantages, dtype)
    result, grad = run(case, old, given, clip_range=1e-2, backend=backend)
    silent = [c or a == 0 for _, a, c in CLIPPING]
    assert result.has_grad.tolist() == [not s for s in silent]
    assert [bool((g == 0).all()) for g in grad] == silent
    assert result.metrics.clip_fraction == torch.tensor(clipped).to(old).mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_edge_of_the_clip_the_gradient_stays(backend: str) -> None:
    """Equal to the bound is not beyond it; a range of 0 holds a ratio of exactly 1."""
    case, old, given = ratio_case([0.0, 0.0], [1.0, -1.0])
    result, grad = run(case, old, given, clip_range=0.0, backend=backend)
    assert result.ratio.tolist() == [1.0, 1.0] and result.metrics.clip_fraction == 0
    assert result.has_grad.all() and bool((grad != 0).any(1).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cfg", [False, True])
def test_samples_without_gradient_are_not_read(cfg: bool, dtype: torch.dtype, backend: str) -> None:
    """No gradient comes in for a sample: NaN anywhere in it stays out of the gradient that goes out."""
    table = TABLES["flow"]
    case = make_case((3, 600), table, (dtype, dtype, dtype), cfg=cfg)
    packed = table.packed(dtype=reference.compute_dtype(case.latents))
    grad = torch.tensor([0.5, 0.0, -0.5], dtype=packed.dtype)
    poisoned = case.map(lambda t: torch.where(torch.tensor([False, True, False])[:, None], math.nan, t))

    def gradients(c: Case) -> tuple[Tensor, Tensor]:
        step = (c.latents, c.output, c.next_latents, c.uncond, c.guidance or 1.0, packed, None, 1, False, backend)
        return torch.ops.dgf.transition_log_prob_backward(*step, grad)

    for clean, found in zip(gradients(case), gradients(poisoned), strict=True):
        if clean.numel():
            assert bool((found[1] == 0).all())
            assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", [{}, {"kl": True}, {"ratio_norm": True}])
def test_weight_zero_leaves_a_sample_out(option: dict, backend: str) -> None:
    """Metrics are those of the other samples, and the gradient of the sample is exactly 0."""
    table = TABLES["flow"]
    case = make_case((9, 50), table, cfg=True)
    keep = [i for i in range(9) if i != 4]
    case.weight[4] = 0.0
    whole, rest = (train(each, table, backend=backend, **option) for each in (case, case.select(keep)))
    assert bool((whole["grad"][4] == 0).all()) and bool((whole["grad_uncond"][4] == 0).all())
    assert not whole["has_grad"][4] and torch.equal(whole["has_grad"][keep], rest["has_grad"])
    assert whole["metrics.samples"] == 8
    for name in whole:
        if name.startswith("metrics."):
            assert torch.equal(whole[name], rest[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_zero_everywhere(backend: str) -> None:
    case = make_case((3, 50), TABLES["flow"])
    found = train(case.select(slice(None)), TABLES["flow"], backend=backend)
    assert found["metrics.samples"] == 3
    case.weight.zero_()
    found = train(case, TABLES["flow"], backend=backend)
    assert found["loss"] == 0 and bool((found["grad"] == 0).all()) and not bool(found["has_grad"].any())
    assert all(v == 0 for name, v in found.items() if name.startswith("metrics."))


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_by_hand(backend: str) -> None:
    log_ratios, advantages = [0.0, 0.2, -0.3, 0.1], [1.0, 7.0, -6.0, -0.5]
    case, old, given = ratio_case(log_ratios, advantages)
    result, _ = run(case, old, given, clip_range=0.05, backend=backend)
    rho = torch.tensor(log_ratios, dtype=F64).exp()
    limited = given.clamp(-5, 5)
    term = torch.maximum(-limited * rho, -limited * rho.clamp(0.95, 1.05))
    wanted = {"samples": 4.0, "clip_fraction": 0.5, "advantage_clip_fraction": 0.5, "reference_kl": 0.0}
    wanted |= {"ratio_mean": rho.mean(), "ratio_max_dev": (rho - 1).abs().max(), "policy_loss": term.mean()}
    wanted["approx_kl"] = (rho - 1 - rho.log()).mean()
    assert wanted.keys() == result.metrics._asdict().keys()
    for name, value in wanted.items():
        assert_same_formula(getattr(result.metrics, name), torch.as_tensor(value, dtype=F64))
    assert_same_formula(result.loss.detach(), term.mean())
    assert_same_formula(result.ratio, rho)


def test_metrics_are_one_tensor_whose_members_go_by_names_and_numbers() -> None:
    case, old, given = ratio_case([0.0, 0.2], [1.0, -7.0], F32)
    metrics = run(case, old, given)[0].metrics
    names = PolicyMetrics._fields
    assert len(metrics) == len(names) == len(metrics.values) and not metrics.values.requires_grad
    by_name = [getattr(metrics, name) for name in names]
    assert all(
        one.shape == () and one.data_ptr() == same.data_ptr() for one, same in zip(by_name, metrics, strict=True)
    )
    samples, *_, last = metrics
    assert samples == 2 and torch.equal(last, metrics[-1]) and torch.equal(last, metrics.policy_loss)
    assert list(metrics._asdict()) == list(names) and repr(metrics).startswith("PolicyMetrics(samples=float32[], clip_")
    doubled = tree_map(lambda tensor: tensor * 2, metrics)
    assert isinstance(doubled, PolicyMetrics) and doubled.samples == 4
    assert not hasattr(metrics, "other")


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_kl_metric_and_weight(backend: str) -> None:
    """The KL of two Gaussians of one variance, in the metric even when its weight is 0."""
    table = TABLES["flow"]
    case, old, given = ratio_case([0.0, 0.0], [1.0, -1.0])
    v, u = case.output, case.reference_output
    kl = (float(table.b[1]) * (v - u)).square().mean(1) / (2 * float(table.tau[1]) ** 2)
    silent, _ = run(case, old, given, reference_output=u, backend=backend)
    counted, _ = run(case, old, given, reference_output=u, kl_weight=0.25, backend=backend)
    assert_same_formula(silent.metrics.reference_kl, kl.mean())
    assert_same_formula((counted.loss - silent.loss).detach(), 0.25 * kl.mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_as_weight(backend: str) -> None:
    """1 / (accumulated steps): the gradient is that of the scaled loss."""
    case, old, given = ratio_case([0.0, 0.01], [1.0, -1.0])
    whole, grad = run(case, old, given, backend=backend)
    part, part_grad = run(case, old, given, weight=0.25, backend=backend)
    assert torch.equal(part.loss, whole.loss / 4) and torch.equal(part_grad, grad / 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_loss_and_the_outputs_are_differentiable(backend: str) -> None:
    case = make_case((2, 50), TABLES["flow"], cfg=True).map(lambda t: t.clone().requires_grad_())
    settings = {"reference_output": case.reference_output, "kl_weight": 0.1, "backend": backend}
    result = policy_loss(*case.lost(TABLES["flow"]), **case.guided, **settings)
    assert result.loss.requires_grad
    assert not any(t.requires_grad for t in (result.log_prob, result.ratio, result.has_grad, *result.metrics))
    result.loss.backward()
    assert case.output.grad is not None and case.uncond.grad is not None
    assert case.latents.grad is None and case.next_latents.grad is None and case.reference_output.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_conditional_output_may_need_a_gradient(backend: str) -> None:
    case = make_case((2, 50), TABLES["flow"], cfg=True)
    both = train(case, TABLES["flow"], backend=backend)
    leaf = case.output.clone().requires_grad_()
    settings = {"weight": case.weight, "backend": backend}
    policy_loss(*case.lost(TABLES["flow"], leaf), **case.guided, **settings).loss.backward()
    assert torch.equal(leaf.grad, both["grad"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["log_prob", "loss"])
def test_second_derivatives_are_refused(op: str, backend: str) -> None:
    """The backward is not differentiable; it must say so and not give zeros."""
    case = make_case((2, 8), TABLES["flow"], (F64, F64, F64))
    leaf = case.output.clone().requires_grad_()
    if op == "loss":
        value = policy_loss(*case.lost(TABLES["flow"], leaf), clip_range=1.0, backend=backend).loss
    else:
        value = transition_log_prob(*case.scored(TABLES["flow"], leaf), backend=backend).sum()
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        grad.square().sum().backward()
