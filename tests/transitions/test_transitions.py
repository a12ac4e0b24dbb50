"""Sampler tables: golden values, the definitions they come from, and the schedulers they replace."""

import math
from collections.abc import Callable

import pytest
import torch

from dancegrpo_fast import transition_log_prob, transition_step
from dancegrpo_fast.transitions import (
    PACKED_COLUMNS,
    TransitionTable,
    cps,
    dance_sde,
    ddim,
    flow_sde,
    from_scheduler,
    mixed,
    ode,
    shifted_sigmas,
    vp_sde,
)

from ..tolerances import assert_as_printed, assert_first_order, assert_same_formula, assert_within_budget
from .schedulers import ddim_scheduler, flow_scheduler

F64 = torch.float64
BACKENDS = ("cpu", "reference")
ALPHAS = torch.cumprod(1.0 - torch.linspace(1e-4, 2e-2, 1000, dtype=F64), 0)


def flow_row(sigmas: tuple[float, float]) -> TransitionTable:
    return flow_sde(sigmas, 0.7)


# table, then a, b, tau, logp[0], logp[1], mean[0, 0] as printed
GOLDEN = {
    "flow 1->.9": (
        flow_row((1.0, 0.9)),
        ("0.755", "-0.1", "0.7", "-0.811922440598", "-0.825733421660", "0.539776944617"),
    ),
    "flow .75->.5": (
        flow_row((0.75, 0.5)),
        ("0.755", "-0.31125", "0.606217782649", "-0.668081404373", "-0.681892385434", "0.337962111290"),
    ),
    "flow .1->0": (
        flow_row((0.1, 0.0)),
        ("0.972777777778", "-0.1245", "0.073786478737", "1.437982394567", "1.424171413505", "0.699624881770"),
    ),
    "dance 1->.9375": (
        dance_sde((1.0, 0.9375), 0.3),
        ("0.9971875", "-0.0625", "0.075", "1.421669780909", "1.407858799847", "0.779395817093"),
    ),
    "dance .75->.5": (
        dance_sde((0.75, 0.5), 0.3),
        ("0.985", "-0.25375", "0.15", "0.728522600349", "0.714711619287", "0.586432285920"),
    ),
    "dance .1->0": (
        dance_sde((0.1, 0.0), 0.3),
        ("0.955", "-0.1405", "0.094868329805", "1.186667966286", "1.172856985224", "0.669380013769"),
    ),
    "cps .75->.5": (
        cps((0.75, 0.5), 0.8),
        ("0.654508497187", "-0.336372875703", "0.475528258148", "-0.112909276214", "-0.119155351077", "0.229400627582"),
    ),
    "cps .1->0": (cps((0.1, 0.0), 0.8), ("1", "-0.1", "0", "0", "0", "0.745937335895")),
}


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    i = torch.arange(16, dtype=F64)
    return tuple(t.reshape(2, 8) for t in (torch.sin(1 + 0.7 * i), torch.cos(0.3 + 1.1 * i), torch.sin(2 + 1.9 * i)))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_rows(name: str) -> None:
    table, (a, b, tau, *_) = GOLDEN[name]
    for column, printed in ((table.a, a), (table.b, b), (table.tau, tau)):
        assert_as_printed(column[0], printed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_step(name: str, backend: str) -> None:
    table, (*_, first, second, mean) = GOLDEN[name]
    x, v, eps = golden_inputs()
    step = transition_step(x, v, table, 0, noise=eps, backend=backend)
    still = transition_step(x, v, table, 0, noise=torch.zeros_like(eps), backend=backend)
    assert_as_printed(step.log_prob[0], first)
    assert_as_printed(step.log_prob[1], second)
    assert_as_printed(still.latents[0, 0], mean)
    assert_same_formula(still.latents, table.a * x + table.b * v)
    assert torch.equal(transition_log_prob(x, v, step.latents, table, 0, backend=backend), step.log_prob)


SIGMAS = shifted_sigmas(7, 3.0)


def estimates(x: torch.Tensor, v: torch.Tensor, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and the noise."""
    return x - s * v, x + (1 - s) * v


def dance_definition(x, v, s, n, eta, eps):
    x0, _ = estimates(x, v, s)
    score = -(x - (1 - s) * x0) / s**2
    return x + (n - s) * (v - 0.5 * eta**2 * score) + eta * math.sqrt(s - n) * eps


def flow_definition(x, v, s, n, eta, eps):
    # The published guard of the division: the second sigma stands in for 1.
    return dance_definition(x, v, s, n, eta * math.sqrt(s / (1 - (float(SIGMAS[1]) if s == 1.0 else s))), eps)


def cps_definition(x, v, s, n, eta, eps):
    x0, x1 = estimates(x, v, s)
    tau = n * math.sin(eta * math.pi / 2)
    return (1 - n) * x0 + math.sqrt(n**2 - tau**2) * x1 + tau * eps


@pytest.mark.parametrize(
    ("build", "definition"), [(dance_sde, dance_definition), (flow_sde, flow_definition), (cps, cps_definition)]
)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_flow_tables_follow_their_definitions(build: Callable, definition: Callable, eta: float) -> None:
    x, v, eps = golden_inputs()
    table = build(SIGMAS, eta)
    for i, (s, n) in enumerate(zip(SIGMAS.tolist(), SIGMAS[1:].tolist(), strict=False)):
        step = transition_step(x, v, table, i, noise=eps, return_denoised=True)
        assert_same_formula(step.latents, definition(x, v, s, n, eta, eps))
        assert_same_formula(step.denoised, estimates(x, v, s)[0])


@pytest.mark.parametrize("build", [dance_sde, flow_sde, cps])
def test_published_split_of_the_output(build: Callable) -> None:
    table = build(SIGMAS, 0.6)
    split = table.drift_weight * table.drift + table.denoised_weight * table.q
    assert_same_formula(split, table.b)
    assert_same_formula(table.step_size, SIGMAS[:-1] - SIGMAS[1:])


@pytest.mark.parametrize("build", [dance_sde, flow_sde, cps])
def test_without_noise_every_flow_sampler_is_the_ode(build: Callable) -> None:
    table, euler = build(SIGMAS, 0.0), ode(SIGMAS)
    assert table.is_deterministic and euler.is_deterministic and not build(SIGMAS, 0.5).is_deterministic
    for column in ("a", "b", "tau", "p", "q"):
        assert_same_formula(getattr(table, column), getattr(euler, column))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_is_the_schedulers_step(prediction_type: str, eta: float, spacing: str, set_alpha_to_one: bool) -> None:
    settings = {"timestep_spacing": spacing, "set_alpha_to_one": set_alpha_to_one}
    scheduler = ddim_scheduler(10, prediction_type=prediction_type, **settings)
    table = from_scheduler(scheduler, noise_level=eta)
    assert table.times.tolist() == scheduler.timesteps.tolist()
    x, v, eps = (t.float() for t in golden_inputs())
    plain = [scheduler.step(v, t, x, eta=eta, variance_noise=eps, return_dict=False) for t in scheduler.timesteps]
    # The same scheduler in float64 is the truth.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    for i, t in enumerate(scheduler.timesteps):
        wanted = scheduler.step(v.double(), t, x.double(), eta=eta, variance_noise=eps.double(), return_dict=False)
        step = transition_step(x, v, table, i, noise=eps, return_denoised=True)
        assert_within_budget(step.latents, wanted[0], plain[i][0])
        assert_within_budget(step.denoised, wanted[1], plain[i][1])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ode_is_the_flow_schedulers_step(shift: float) -> None:
    scheduler = flow_scheduler(6, shift=shift)
    table = from_scheduler(scheduler)
    x, v, _ = (t.float() for t in golden_inputs())
    for i, t in enumerate(scheduler.timesteps):
        ours = transition_step(x, v, table, i).latents
        theirs = scheduler.step(v, t, x, return_dict=False)[0]
        truth = transition_step(x.double(), v.double(), table, i).latents
        assert_within_budget(theirs, truth, ours)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("sampler", "build"), [("dance_sde", dance_sde), ("flow_sde", flow_sde), ("cps", cps), ("ode", None)]
)
def test_from_flow_scheduler(sampler: str, build: Callable | None, shift: float) -> None:
    scheduler = flow_scheduler(6, shift=shift)
    sigmas = scheduler.sigmas.double()
    wanted = ode(sigmas) if build is None else build(sigmas, 0.6)
    level = 0.0 if build is None else 0.6
    found = from_scheduler(scheduler, sampler, level)
    assert torch.equal(found.packed(dtype=F64), wanted.packed(dtype=F64)) and tuple(found.kind) == tuple(wanted.kind)
    window = from_scheduler(scheduler, sampler, level, window=[1, 2])
    assert torch.equal(window.packed(dtype=F64), mixed(wanted, ode(sigmas), [1, 2]).packed(dtype=F64))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_vp_sde_from_scheduler_with_window(prediction_type: str) -> None:
    scheduler = ddim_scheduler(10, prediction_type=prediction_type)
    settings = {
        "prediction_type": prediction_type,
        "previous_timesteps": scheduler.timesteps - 100,
        "final_alpha_cumprod": float(scheduler.final_alpha_cumprod),
    }
    wanted = vp_sde(scheduler.alphas_cumprod, scheduler.timesteps, 0.5, **settings)
    still = ddim(scheduler.alphas_cumprod, scheduler.timesteps, 0.0, **settings)
    found = from_scheduler(scheduler, "vp_sde", 0.5)
    window = from_scheduler(scheduler, "vp_sde", 0.5, window=[0, 3])
    for column in ("a", "b", "tau", "p", "q", "times"):
        noisy, quiet = getattr(wanted, column), getattr(still, column)
        assert torch.equal(getattr(found, column), noisy)
        assert torch.equal(getattr(window, column)[[0, 3]], noisy[[0, 3]])
        assert torch.equal(getattr(window, column)[[1, 2]], quiet[[1, 2]])


def cosine_alphas(steps: int) -> torch.Tensor:
    """The same smooth schedule at any resolution: from little noise (first) to much (last)."""
    return torch.cos(torch.linspace(0.1, 1.4, steps + 1, dtype=F64)).square()


REFINED = (250, 500, 1000, 2000)
DATA_VARIANCE = 0.3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_vp_sde_without_noise_converges_to_ddim(prediction_type: str) -> None:
    """Deterministic Gaussian data: one exact model, two integrators of one ODE."""
    errors = []
    for steps in REFINED:
        alphas = cosine_alphas(steps)
        times = torch.arange(steps, 0, -1)
        ends, settings = [], {"final_alpha_cumprod": float(alphas[0]), "previous_timesteps": times - 1}
        for build in (vp_sde, ddim):
            table, x = build(alphas, times, 0.0, prediction_type, **settings), 1.0
            for a, b, t in zip(table.a.tolist(), table.b.tolist(), times.tolist(), strict=True):
                x = a * x + b * exact_prediction(float(alphas[t]), prediction_type) * x
            ends.append(x)
        errors.append(abs(ends[0] - ends[1]))
    assert_first_order(errors)


def exact_prediction(alpha: float, prediction_type: str) -> float:
    """Factor of x in the best prediction for data N(0, DATA_VARIANCE)."""
    total = alpha * DATA_VARIANCE + 1 - alpha
    clean, noise = math.sqrt(alpha) * DATA_VARIANCE / total, math.sqrt(1 - alpha) / total
    velocity = math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * clean
    return {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_vp_sde_keeps_the_marginals(eta: float, prediction_type: str) -> None:
    """The variance of Gaussian data after the whole trajectory is the schedule's, whatever eta."""
    errors = []
    for steps in REFINED:
        alphas, times = cosine_alphas(steps), torch.arange(steps, 0, -1)
        table = vp_sde(alphas, times, eta, prediction_type, previous_timesteps=times - 1)
        variance = float(alphas[-1]) * DATA_VARIANCE + 1 - float(alphas[-1])
        for a, b, tau, t in zip(table.a.tolist(), table.b.tolist(), table.tau.tolist(), times.tolist(), strict=True):
            variance = (a + b * exact_prediction(float(alphas[t]), prediction_type)) ** 2 * variance + tau**2
        errors.append(abs(variance - (float(alphas[0]) * DATA_VARIANCE + 1 - float(alphas[0]))))
    assert_first_order(errors)


@pytest.mark.parametrize("build", [dance_sde, flow_sde])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
def test_flow_sdes_keep_the_marginals(build: Callable, eta: float) -> None:
    errors = []
    for steps in REFINED:
        sigmas = torch.linspace(0.95, 0.2, steps + 1, dtype=F64)
        table = build(sigmas, eta)
        marginal = ((1 - sigmas).square() * DATA_VARIANCE + sigmas.square()).tolist()
        variance = marginal[0]
        columns = (sigmas[:-1], table.a, table.b, table.tau)
        for here, s, a, b, tau in zip(marginal[:-1], *(c.tolist() for c in columns), strict=True):
            velocity = (s - (1 - s) * DATA_VARIANCE) / here
            variance = (a + b * velocity) ** 2 * variance + tau**2
        errors.append(abs(variance - marginal[-1]))
    assert_first_order(errors)


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_cps_leaves_exactly_the_next_sigmas_noise(level: float) -> None:
    table, n = cps(SIGMAS, level), SIGMAS[1:]
    kept = table.a - (1 - n)
    assert_same_formula(kept.square() + table.tau.square(), n.square())


def test_mixed_takes_rows_from_both() -> None:
    noisy, still = cps(SIGMAS, 0.5), ode(SIGMAS)
    table = mixed(noisy, still, [2, 3])
    assert tuple(table.kind) == ("none", "none", "quadratic", "quadratic", "none", "none", "none")
    chosen = torch.tensor([False, False, True, True, False, False, False])
    wanted = torch.where(chosen[:, None], noisy.packed(dtype=F64), still.packed(dtype=F64))
    assert torch.equal(table.packed(dtype=F64), wanted)
    assert mixed(noisy, still, []).is_deterministic
    assert torch.equal(mixed(noisy, still, range(7)).packed(), noisy.packed())


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_sigmas(shift: float) -> None:
    sigmas = shifted_sigmas(5, shift)
    wanted = [shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)]
    assert_same_formula(sigmas, torch.tensor(wanted, dtype=F64))
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0


def test_packed_columns_and_cache() -> None:
    table = flow_sde(SIGMAS, 0.7)
    packed = table.packed(dtype=F64)
    assert packed.shape == (7, len(PACKED_COLUMNS)) and len(table) == 7
    for name in ("a", "b", "tau", "p", "q", "step_size", "drift", "drift_weight", "denoised_weight"):
        assert torch.equal(packed[:, PACKED_COLUMNS.index(name)], getattr(table, name))
    assert_same_formula(packed[:, PACKED_COLUMNS.index("log_prob_scale")], -0.5 / table.tau.square())
    assert table.packed() is table.packed("cpu", torch.float32)
    assert torch.equal(table.packed(), packed.float())
