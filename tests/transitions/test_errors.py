"""Sampler tables refuse bad arguments by name, and rows without noise score 0."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from dancegrpo_fast import transition_log_prob, transition_step
from dancegrpo_fast.transitions import (
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

from .schedulers import ddim_scheduler, flow_scheduler

F64 = torch.float64
INF, NAN = float("inf"), float("nan")
GOOD = (1.0, 0.5, 0.0)
ALPHAS = torch.linspace(0.99, 0.01, 100, dtype=F64)
TIMES = (90, 50, 10)
FLOWS = (lambda s: dance_sde(s, 0.3), lambda s: flow_sde(s, 0.3), lambda s: cps(s, 0.3), ode)


@pytest.mark.parametrize("build", FLOWS)
@pytest.mark.parametrize(
    "sigmas",
    [(), (1.0,), (1.0, 1.0, 0.0), (0.0, 1.0), (1.5, 0.5), (1.0, -0.1), (1.0, NAN), (INF, 0.5), [[1.0, 0.5]]],
    ids=str,
)
def test_bad_sigmas(build: Callable, sigmas) -> None:
    with pytest.raises(ValueError, match=r"^sigmas: "):
        build(sigmas)


@pytest.mark.parametrize("level", [-0.1, NAN, INF])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda level: dance_sde(GOOD, level), "eta"),
        (lambda level: flow_sde(GOOD, level), "noise_level"),
        (lambda level: cps(GOOD, level), "noise_level"),
        (lambda level: ddim(ALPHAS, TIMES, level), "eta"),
        (lambda level: vp_sde(ALPHAS, TIMES, level), "eta"),
    ],
    ids=["dance", "flow", "cps", "ddim", "vp"],
)
def test_bad_noise_level(build: Callable, name: str, level: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        build(level)


def test_level_above_what_the_step_holds() -> None:
    with pytest.raises(ValueError, match=r"^noise_level: "):
        cps(GOOD, 1.01)
    with pytest.raises(ValueError, match=r"^eta: .*more noise"):
        ddim(ALPHAS, TIMES, 3.0)


DIFFUSION_ERRORS = {
    "alphas_cumprod": ([0.9, 0.5, 0.0], [1.0, 0.5], [0.9, NAN], ALPHAS.flip(0), ALPHAS[None]),
    "timesteps": ([], [[3, 1]], [10, 50], [50, 50], [100, 50], [50, -1]),
    "prediction_type": ("score",),
    "previous_timesteps": ([1, 0], [95, 49, 9]),
    "final_alpha_cumprod": (0.0, 1.1, NAN),
}


@pytest.mark.parametrize("build", [ddim, vp_sde])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in DIFFUSION_ERRORS.items() for value in bad])
def test_bad_diffusion_schedule(build: Callable, name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        build(**{"alphas_cumprod": ALPHAS, "timesteps": TIMES, "eta": 0.5, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("num_steps", 0), ("num_steps", -3), *(("shift", value) for value in (0.0, -1.0, NAN, INF))]
)
def test_bad_flow_schedule(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        shifted_sigmas(**{"num_steps": 4, name: value})


@pytest.mark.parametrize("index", [-1, 2, 100])
def test_window_out_of_range(index: int) -> None:
    with pytest.raises(ValueError, match=r"^window: "):
        mixed(dance_sde(GOOD, 0.3), ode(GOOD), [0, index])


def test_mixed_of_different_schedules() -> None:
    for other in ((1.0, 0.4, 0.0), (1.0, 0.5, 0.2, 0.0)):
        with pytest.raises(ValueError, match=r"^deterministic: "):
            mixed(dance_sde(GOOD, 0.3), ode(other), [0])


NOT_AFFINE = ("clip_sample", "thresholding", "rescale_betas_zero_snr")


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        *((partial(ddim_scheduler, **{name: True}), {}, f"scheduler: .*{name}") for name in NOT_AFFINE),
        (partial(flow_scheduler, stochastic_sampling=True), {}, "scheduler: .*stochastic_sampling"),
        (partial(SimpleNamespace, num_inference_steps=4), {}, "scheduler: .*SimpleNamespace"),
        (partial(ddim_scheduler, 0), {}, "scheduler: .*set_timesteps"),
        (partial(flow_scheduler, 0), {}, "scheduler: .*set_timesteps"),
        (flow_scheduler, {"sampler": "ddim"}, "sampler: "),
        (ddim_scheduler, {"sampler": "flow_sde"}, "sampler: "),
        (flow_scheduler, {"sampler": "dance_sde", "noise_level": 0.3, "window": [4]}, "window: "),
        *((make, {"noise_level": -1.0}, "(eta|noise_level): ") for make in (flow_scheduler, ddim_scheduler)),
    ],
)
def test_schedulers(make: Callable, arguments: dict, match: str) -> None:
    """Steps that are not affine, noise of their own, another kind or none yet; a sampler of the other family."""
    with pytest.raises(ValueError, match=f"^{match}"):
        from_scheduler(make(), **arguments)


def columns(**changed) -> dict:
    one = torch.ones(2, dtype=F64)
    named = ("a", "b", "tau", "p", "q", "times", "step_size", "drift", "drift_weight", "denoised_weight")
    return {**dict.fromkeys(named, one), "kind": ("gaussian", "none"), **changed}


ODD = (object(), "abc", {}, 1 + 2j, [[1.0]])


@pytest.mark.parametrize("value", [None, True, torch.tensor(0.3), [0.3], 10**400, *ODD], ids=lambda v: type(v).__name__)
def test_levels_of_another_type(value) -> None:
    for build in (dance_sde, flow_sde, cps):
        with pytest.raises(ValueError, match=r"^(eta|noise_level): "):
            build(GOOD, value)
    for build in (ddim, vp_sde):
        with pytest.raises(ValueError, match=r"^eta: "):
            build(ALPHAS, TIMES, value)
        with pytest.raises(ValueError, match=r"^final_alpha_cumprod: "):
            build(ALPHAS, TIMES, 0.5, final_alpha_cumprod=value)
    with pytest.raises(ValueError, match=r"^noise_level: "):
        from_scheduler(flow_scheduler(), "dance_sde", value)
    with pytest.raises(ValueError, match=r"^shift: "):
        shifted_sigmas(4, value)
    with pytest.raises(ValueError, match=r"^num_steps: "):
        shifted_sigmas(value)


@pytest.mark.parametrize("value", [None, 1.0, True, *ODD], ids=lambda v: type(v).__name__)
def test_columns_of_another_type(value) -> None:
    for build in (*FLOWS, lambda s: dance_sde(s, 0.1)):
        with pytest.raises(ValueError, match=r"^sigmas: "):
            build(value)
    for name in ("alphas_cumprod", "timesteps", "previous_timesteps"):
        if (name, value) != ("previous_timesteps", None):
            with pytest.raises(ValueError, match=rf"^{name}: "):
                ddim(**{"alphas_cumprod": ALPHAS, "timesteps": TIMES, "eta": 0.5, name: value})
    with pytest.raises(ValueError, match=r"^prediction_type: "):
        ddim(ALPHAS, TIMES, 0.5, value)
    if value is not None:
        with pytest.raises(ValueError, match=r"^sampler: "):
            from_scheduler(flow_scheduler(), value)
    for name in ("a", "b", "tau", "times", "kind", "drift"):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            TransitionTable(**columns(**{name: value}))
    with pytest.raises(ValueError, match=r"^(stochastic|deterministic): "):
        mixed(dance_sde(GOOD, 0.3), value, [0])
    with pytest.raises(ValueError, match=r"^stochastic: "):
        mixed(value, ode(GOOD), [0])
    with pytest.raises(ValueError, match=r"^window: "):
        mixed(dance_sde(GOOD, 0.3), ode(GOOD), [value])
    if not isinstance(value, dict):
        with pytest.raises(ValueError, match=r"^window: "):
            mixed(dance_sde(GOOD, 0.3), ode(GOOD), value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("a", "b", "tau") for value in (None, "abc", [1.0, NAN], [[1.0]], INF)],
        *[(name, [1.0] * 3) for name in ("b", "tau", "p", "q", "times", "step_size")],
        ("a", 1.0),
        ("a", []),
        ("tau", -0.1),
        ("p", None),
        ("q", None),
        ("p", [1.0, NAN]),
        ("kind", "normal"),
        ("kind", ["gaussian"]),
        ("kind", None),
        ("times", "ab"),
    ],
    ids=str,
)
def test_bad_coefficients(name: str, value) -> None:
    good = {"a": [1.0, 1.0], "b": -0.1, "tau": 0.2, "p": 1.0, "q": [-1.0, -0.5]}
    TransitionTable.from_coefficients(**good)
    with pytest.raises(ValueError, match=rf"^{'a' if value == ['gaussian'] else 'table' if value == [] else name}: "):
        TransitionTable.from_coefficients(**good | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", torch.ones(3, dtype=F64)),
        ("a", torch.ones(2, dtype=F64, device="meta")),
        ("q", torch.tensor([1.0, NAN], dtype=F64)),
        ("step_size", torch.tensor([1.0, NAN], dtype=F64)),
        ("b", torch.ones(2)),
        ("p", torch.tensor([1.0, NAN], dtype=F64)),
        ("tau", torch.tensor([0.5, -0.5], dtype=F64)),
        ("times", torch.ones(1, dtype=F64)),
        ("kind", ("gaussian", "normal")),
        ("kind", "gaussian"),
    ],
)
def test_bad_table_column(name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        TransitionTable(**columns(**{name: value}))


def test_table_without_rows() -> None:
    empty = torch.ones(0, dtype=F64)
    with pytest.raises(ValueError, match=r"^table: "):
        TransitionTable(**{**dict.fromkeys(columns(), empty), "kind": ()})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("table", [ode(GOOD), cps((0.5, 0.0), 0.8), mixed(dance_sde(GOOD, 0.3), ode(GOOD), [1])])
def test_rows_without_noise_score_zero(table: TransitionTable, dtype: torch.dtype, backend: str) -> None:
    """Row 0 of each table has tau 0: the mean is stored, whatever the noise, and the gradient is 0."""
    g = torch.Generator().manual_seed(0)
    x, v, eps = (torch.randn(3, 50, generator=g).to(dtype) for _ in range(3))
    step = transition_step(x, v, table, 0, noise=eps * float("nan"), backend=backend)
    mean = transition_step(x, v, table, 0, noise=torch.zeros_like(eps), backend=backend)
    assert torch.equal(step.latents, mean.latents) and bool(step.latents.isfinite().all())
    assert torch.equal(step.log_prob, torch.zeros_like(step.log_prob))
    v.requires_grad_()
    score = transition_log_prob(x, v, eps, table, 0, backend=backend)
    score.sum().backward()
    assert torch.equal(score.detach(), torch.zeros_like(score)) and torch.equal(v.grad, torch.zeros_like(v))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_without_noise_never_give_nan(backend: str) -> None:
    """A difference whose square overflows still scores 0."""
    x = torch.full((1, 4), 1e30)
    assert transition_log_prob(x, x, -x, ode(GOOD), 0, backend=backend).tolist() == [0.0]


def test_noise_too_small_for_float32_is_refused() -> None:
    """`1 / tau^2` would be infinite and meet differences of exactly 0."""
    with pytest.raises(ValueError, match=r"^tau: "):
        dance_sde(GOOD, 1e-20)
