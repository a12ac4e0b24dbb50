"""UniRL's strategies with our step against its own."""

import importlib
import pickle

import pytest
import torch

from dancegrpo_fast import transitions
from dancegrpo_fast.kernels.transition import reference
from dancegrpo_fast.plugins import _rows

from ..compat.cases import seeded
from ..tolerances import assert_within_budget
from . import engines

NAMES = ("FlowSDEStrategy", "DanceSDEStrategy", "CPSSDEStrategy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGMAS = torch.linspace(1.0, 0.0, 9, dtype=torch.float64)
SHAPE = (6, 4, 6, 5)


def call(i: int, dtype: torch.dtype, **changes):
    torch.manual_seed(i)
    sample, output = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(torch.bfloat16)
    tensors = {"noise_pred": output, "sample": sample, "sigma": SIGMAS[i], "sigma_next": SIGMAS[i + 1]}
    return tensors | {"eta": 0.7, "sigma_max": SIGMAS[1].float(), "step_index": i} | changes


def theirs(name: str):
    return getattr(importlib.import_module("unirl.sde.kernels"), name)()


def truth(name: str, given: dict, prev_sample: torch.Tensor | None = None):
    kind = {"FlowSDEStrategy": "flow", "DanceSDEStrategy": "dance", "CPSSDEStrategy": "cps"}[name]
    double = type(name, (engines.Strategy,), {"kind": kind})()
    wide = {key: value.double() if key in ("noise_pred", "sample") else value for key, value in given.items()}
    return double.denoise(**wide, prev_sample=None if prev_sample is None else prev_sample.double())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("i", [0, 3, 6])
def test_steps(unirl, name: str, dtype: torch.dtype, i: int) -> None:
    ours, given = getattr(unirl, name)(), call(i, dtype)
    after, log_prob, mean = seeded(9, ours.denoise, **given)
    state = torch.get_rng_state()
    plain = seeded(9, theirs(name).denoise, **given)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(after, after.to(dtype).float())
    assert_within_budget(after, seeded(9, truth, name, given)[0], plain[0])
    exact = truth(name, given, after)
    assert_within_budget(mean, exact[2], plain[2])
    again = theirs(name).denoise(**given, prev_sample=after)
    assert_within_budget(log_prob, exact[1], again[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ratios_are_one_and_gradients_right(unirl, name: str, dtype: torch.dtype) -> None:
    ours = getattr(unirl, name)()
    for i in (0, 3, 6):
        given = call(i, dtype)
        with torch.no_grad():
            after, old, _ = ours.denoise(**given)
        found = []
        for strategy, stored in ((ours, after.to(dtype)), (theirs(name), after.to(dtype))):
            output = given["noise_pred"].clone().requires_grad_()
            result = strategy.denoise(**given | {"noise_pred": output}, prev_sample=stored)
            weights = torch.arange(1.0, 1 + len(old))
            (grad,) = torch.autograd.grad((result[1] * weights).sum() + result[2].sum(), output)
            found.append((result, grad))
        assert torch.equal(torch.exp(found[0][0][1] - old), torch.ones(len(old)))
        wide = given["noise_pred"].double().requires_grad_()
        exact = truth(name, given | {"noise_pred": wide}, after)
        (grad,) = torch.autograd.grad((exact[1] * torch.arange(1.0, 1 + len(old))).sum() + exact[2].sum(), wide)
        assert_within_budget(found[0][1], grad, found[1][1])


def test_each_sample_may_be_at_its_own_sigma(unirl) -> None:
    ours, rows = unirl.FlowSDEStrategy(), torch.tensor([0, 3, 6, 3, 1, 2])
    given = call(0, torch.float32, sigma=SIGMAS[rows], sigma_next=SIGMAS[rows + 1])
    after, old, mean = ours.denoise(**given)
    for row in range(len(rows)):
        one = given | {k: given[k][row : row + 1] for k in ("noise_pred", "sample", "sigma", "sigma_next")}
        alone = ours.denoise(**one, prev_sample=after[row : row + 1])
        assert torch.equal(alone[1], old[row : row + 1]) and torch.equal(alone[2], mean[row : row + 1])


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_coefficients_are_those_of_the_tables(kind: str) -> None:
    sigmas = SIGMAS.float()
    found = _rows.rows(kind.removesuffix("_sde"), sigmas[:-1], sigmas[1:], 0.7, sigmas[1])
    used = [reference.A, reference.B, reference.TAU, reference.P, reference.Q, reference.SCALE, reference.CONSTANT]
    used.append(reference.STEP_SIZE)
    wanted = getattr(transitions, kind)(sigmas, 0.7).packed("cpu", torch.float32)
    assert torch.equal(found[:, used], wanted[:, used])


TOKENS = {"sigma": SIGMAS[:6].reshape(1, 1, 6, 1), "sigma_next": SIGMAS[1:7].reshape(1, 1, 6, 1)}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("FlowSDEStrategy", {"eta": 0.0}, ""),
        ("FlowSDEStrategy", {"eta": torch.tensor(0.5)}, "a tensor for eta"),
        ("FlowSDEStrategy", TOKENS, "sigmas of shape (1, 1, 6, 1) and (1, 1, 6, 1)"),
        ("FlowSDEStrategy", {"sample": torch.zeros(1, 4, 6, 5)}, "an output of shape (6, 4, 6, 5) for latents of (1, "),
        ("CPSSDEStrategy", {"eta": 1.5}, "eta above 1"),
    ],
)
def test_what_is_not_ours_goes_to_theirs(unirl, capsys, monkeypatch, name: str, changes: dict, said: str) -> None:
    kernels = importlib.import_module("unirl.sde.kernels")
    monkeypatch.setattr(getattr(kernels, name), "denoise", lambda *args, **kwargs: (args, kwargs))
    given = call(2, torch.float32, **changes)
    for _ in range(2):
        (_, *tensors), settings = getattr(unirl, name)().denoise(**given, prev_sample=given["sample"])
        assert tensors == [given[k] for k in ("noise_pred", "sample", "sigma", "sigma_next")]
        kept = {k: given[k] for k in ("eta", "sigma_max", "step_index")} | {"prev_sample": given["sample"]}
        assert settings == kept
    start = f"dancegrpo-fast: {name}.denoise: a call with {said}"
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(start) for line in lines] == [True] * bool(said)


def test_names(unirl, capsys) -> None:
    made = unirl.CPSSDEStrategy
    assert issubclass(made, importlib.import_module("unirl.sde.kernels").CPSSDEStrategy)
    assert pickle.loads(pickle.dumps(made)) is made
    with pytest.raises(AttributeError, match=r"DPM2Strategy.*want one of FlowSDEStrategy"):
        _ = unirl.DPM2Strategy
    for _ in range(2):
        made().denoise(**call(1, torch.float32))
    assert capsys.readouterr().err == "dancegrpo-fast: CPSSDEStrategy.denoise: our step\n"
