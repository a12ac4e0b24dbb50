"""The sampling step with noise drawn and with noise given, and the log-probability of given next latents.

eager, compile       DanceGRPO's `flux_step` in plain torch; it always computes x0, of which its mean is made
ours                 `transition_step(seed=)`, `transition_step(noise=)`, `transition_log_prob`
ours, x0 too         the same with x0 written
ours, torch noise    noise drawn by torch's generator, as old seeds need
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import dancegrpo_fast as dgf
from bench import peers
from bench.place import Place, place_of
from bench.turns import Contest, cross
from dancegrpo_fast.kernels.transition import reference
from tests.tolerances import assert_within_budget

from .latents import ETA, INDEX, SEED, Call, Case, Inputs, cases

X0, TORCH_NOISE = ", x0 too", ", torch noise"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The log-probability alone is a question on GPUs only: on a CPU the loss has it."""
    place, test = place_of(metafunc.config.getoption("--device")), metafunc.function.__name__
    names = [ours + variant for ours in place.ours for variant in _variants(test.removeprefix("test_"), place)]
    found = [] if test == "test_log_prob" and not place.gpu else list(cases(place))
    cross(metafunc, found, ["eager", "compile", *names], "measured on a GPU")


def test_step(case: Case, place: Place, contest: Any) -> None:
    """Noise is drawn."""
    contest(lambda: _steps(case, place, "step"))


def test_step_given_noise(case: Case, place: Place, contest: Any) -> None:
    """Noise is a tensor."""
    contest(lambda: _steps(case, place, "step_given_noise"))


def test_log_prob(case: Case, place: Place, contest: Any) -> None:
    """Next latents are given."""
    contest(lambda: _scores(case, place))


def _variants(op: str, place: Place) -> tuple[str, ...]:
    """Ours alone on a GPU."""
    return ("",) if place.gpu else {"step": ("", X0, TORCH_NOISE), "step_given_noise": ("", X0)}.get(op, ("",))


def _steps(case: Case, place: Place, op: str) -> Contest:
    inputs, given = Inputs(case, place, scored=False), op == "step_given_noise"

    def peer(step: Any, sigmas: Tensor) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            noise = inputs.noise[i] if given else None
            with torch.no_grad():
                x, _, log_prob = step(inputs.outputs[i], inputs.latents[i], ETA, sigmas, INDEX, None, noise)
            return x, log_prob

        return call

    def ours(backend: str, variant: str) -> Call:
        seed = None if given or variant == TORCH_NOISE else SEED
        options: dict[str, Any] = {"seed": seed, "return_denoised": variant == X0, "backend": backend}

        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            noise = inputs.noise[i] if given else None
            x, v = inputs.latents[i], inputs.outputs[i]
            result = dgf.transition_step(x, v, inputs.table, INDEX, noise=noise, **options)
            return result.latents, result.log_prob

        return call

    calls = {name: peer(*pair) for name, pair in inputs.peers(peers.flux_step).items()}
    calls |= {
        n + variant: ours(backend, variant) for n, backend in place.ours.items() for variant in _variants(op, place)
    }

    def check(name: str) -> None:
        results = [calls[name](i) for i in inputs.few()]
        noise = inputs.noise[0] if given else None
        if name.removesuffix(X0) in place.ours and not given:
            ids = torch.arange(case.batch, device=place.device)
            noise = reference.normals(SEED, ids, torch.full_like(ids, INDEX), case.elements)
        # Of noise that torch's generator drew, no more is known than that what was stored can be scored again.
        if noise is not None:
            x, v, rows = inputs.latents[0], inputs.outputs[0], inputs.rows()
            truth = reference.step(x.double(), v.double(), None, 1.0, rows, noise.double(), torch.float64, None)[0]
            plain = peers.flux_step(v, x, ETA, inputs.sigmas32, INDEX, None, noise)[0]
            assert_within_budget(results[0][0], truth, plain)
        inputs.assert_scores([(stored, log_prob) for stored, log_prob in results])

    least = 4 + case.output_dtype.itemsize + 4 + (4 if given else 0)
    # x0 is written; noise of torch is written by torch and read by the kernel.
    more = {name: (4, 0) if name.endswith(X0) else (0, 8) for name in calls if name.endswith((X0, TORCH_NOISE))}
    return inputs.contest(op, calls, check, least, more)


def _scores(case: Case, place: Place) -> Contest:
    inputs = Inputs(case, place, scored=True)

    def peer(step: Any, sigmas: Tensor) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            with torch.no_grad():
                return (step(inputs.outputs[i], inputs.latents[i], ETA, sigmas, INDEX, inputs.next_latents[i])[2],)

        return call

    def ours(backend: str) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            i %= inputs.sets
            x, v, x_next = inputs.latents[i], inputs.outputs[i], inputs.next_latents[i]
            return (dgf.transition_log_prob(x, v, x_next, inputs.table, INDEX, backend=backend),)

        return call

    calls = {name: peer(*pair) for name, pair in inputs.peers(peers.flux_step).items()}
    calls |= {name: ours(backend) for name, backend in place.ours.items()}

    def check(name: str) -> None:
        inputs.assert_scores([(inputs.next_latents[i], calls[name](i)[0]) for i in inputs.few()])

    return inputs.contest("log_prob", calls, check, 4 + case.output_dtype.itemsize + 4, {})
