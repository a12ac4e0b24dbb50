"""The table of known functions: every row can be called, and forks' signatures find theirs."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dancegrpo_fast.dropin.known import KNOWN, SETTINGS, Known, candidates, misfit

from ..compat.cases import CASES, PEERS, SIGMAS, TIMES, flow_scheduler, seeded
from ..tolerances import assert_same_sample
from .told import V, X, replaced

FLUX, SDE = PEERS["dancegrpo"].flux_step, PEERS["flow_grpo"].sde_step_with_logprob


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known.ours} {dict(known.options)}")
def test_every_row_is_a_function_with_its_options_and_the_settings(known: Known) -> None:
    parameters = inspect.signature(known.load()).parameters
    assert {*SETTINGS, *known.options} <= parameters.keys()
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in SETTINGS)
    assert known.target == f"dancegrpo_fast.compat.{known.ours.replace(':', '.')}"
    assert known in candidates(known.name, known.owner)


def test_every_row_is_what_a_case_is_about() -> None:
    tried = {(case.ours_name, str(case.options)) for case in CASES.values()}
    forks = {"dancegrpo:flux_step_with_ddpo"}
    unipc = {"flow_factory:unipc_step", "flow_factory:unipc_noise_pred_step"}  # states are those of the other scheduler
    for known in KNOWN:
        if known.ours not in forks | unipc:
            assert (known.ours, str(dict(known.options))) in tried, known


def reasons(function: Callable[..., Any], name: str) -> dict[str, str | None]:
    parameters = list(inspect.signature(function).parameters.values())
    return {known.about: misfit(known, parameters) for known in candidates(name, None)}


def test_why_a_row_does_not_fit() -> None:
    found = reasons(SDE, "sde_step_with_logprob")
    assert found["Flow-GRPO"] is None and found["FlowCPS"] == "has a parameter sde_type"
    assert found["Flow-GRPO for Wan"] is None  # its behaviour tells
    found = reasons(FLUX, "flux_step")
    assert found["DanceGRPO"] is found["DanceGRPO until 2025-08"] is None
    assert found["DanceGRPO, a fork"] == "has no parameter ddpo"
    assert reasons(lambda *args: None, "flux_step")["DanceGRPO"] == "has no parameter model_output"


def flux_step_of_a_fork(model_output, latents, eta, sigmas, index, prev_sample, ddpo, sde_solver):
    return FLUX(model_output, latents, eta, sigmas, index, prev_sample, ddpo, sde_solver)


def flux_step_with_split(
    model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver, num_splits=1, split_noise_scale=1.0
):
    found = FLUX(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)
    return tuple(torch.cat([t] * num_splits) for t in found)


def sde_step_with_noise(
    self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None, noise=None
):
    found = SDE(self, model_output, timestep, sample, noise_level, prev_sample, generator)
    return found if noise is None else (noise, *found[1:])


def flux(step: Callable[..., Any], **more: Any) -> Any:
    return step(V, X, 0.3, SIGMAS, 1, None, True, True, **more)


def sde(step: Callable[..., Any], **more: Any) -> Any:
    return step(flow_scheduler(), V, TIMES[:1], X, **more)


FORKS: dict[str, tuple[Any, str, Callable[..., Any], dict[str, Any] | None]] = {
    "ddpo for grpo": (flux_step_of_a_fork, "flux_step", flux, None),
    "splits": (flux_step_with_split, "flux_step_with_split", flux, {"num_splits": 2}),
    "a noise given": (sde_step_with_noise, "sde_step_with_logprob", sde, {"noise": V}),
}


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_s_function_is_replaced_but_for_what_it_adds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, known, call, extra = FORKS[name]
    monkeypatch.setattr(function, "__name__", known)
    told, stand_in = replaced(function)
    for got, expected in zip(seeded(3, call, stand_in), seeded(3, call, function), strict=True):
        assert_same_sample(got, expected)
    assert told.calls() == [1, 0, 0], told.said
    if extra is not None:
        assert all(map(torch.equal, *(seeded(3, call, f, **extra) for f in (stand_in, function))))
        assert told.calls()[2] == 1
