"""Where calls of a replaced function go: to ours, or to the original."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dancegrpo_fast.compat import mixgrpo
from dancegrpo_fast.dropin.known import KNOWN, Known
from dancegrpo_fast.dropin.roles import OUTPUT, STATE, Layout

from ..compat.cases import BF16, F32, PEERS, SIGMAS, draw
from ..processes import LIMIT
from .told import AFTER, STEP, Told, V, X, doing, fork, replaced


def counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """How often it was called."""
    calls: list[int] = []
    note = calls.append  # a list that the function itself holds would be put back

    @wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        note(1)
        return function(*args, **kwargs)

    return counting, calls


def test_amounts_are_tried_once_and_choices_each() -> None:
    original, calls = counted(STEP)
    told, step = replaced(original)
    step(V, X, 0.7, SIGMAS, 1, None)
    first = len(calls)
    step(V, X, 0.5, SIGMAS, 2, None)  # the second call is also timed beside the original, after it was called once
    step(V, X, 0.1, SIGMAS, 0, AFTER)
    assert first > 10 and len(calls) == first + 2
    step(V, X, 0.5, SIGMAS, 2, AFTER, determistic=True)
    assert len(calls) > first + 12 and len(told.said) == 1


def test_a_flag_may_choose_what_ours_does_not() -> None:
    text = ("prev_sample = latents + dt * model_output", "prev_sample = latents - dt * model_output")
    told, step = replaced(fork(text))
    step(V, X, 0.7, SIGMAS, 1, None)
    step(V, X, 0.7, SIGMAS, 1, None, determistic=True)
    assert told.calls() == [1, 0, 1] and "not replaced" in told.said[1]


def test_too_many_ways_go_to_the_original() -> None:
    told, step = replaced(fork(("determistic=False)", "determistic=False, mode='')")))
    for i in range(40):
        step(V, X, 0.7, SIGMAS, 1, AFTER, mode="" if i % 2 else str(i))
    assert told.calls()[2] >= 20 and told.calls()[1] > 0


def test_an_argument_that_ours_lacks_goes_to_the_original_where_it_is_given() -> None:
    scaled = ("determistic=False):", "determistic=False, scale=1.0):\n    latents = latents * scale")
    told, step = replaced(fork(scaled))
    step(V, X, 0.7, SIGMAS, 1, None)
    step(V, X, 0.7, SIGMAS, 1, None, scale=1.0)
    for _ in range(2):
        step(V, X, 0.7, SIGMAS, 1, None, scale=2.0)
    assert told.calls() == [2, 0, 2]
    assert told.said[1] == (
        "x.py:1 flow_grpo_step: not replaced: called with scale=2.0, which dancegrpo_fast.compat.mixgrpo.flow_grpo_step"
        " lacks; such calls go to the original"
    )


def test_a_signature_that_does_not_fit_goes_to_the_original() -> None:
    told, step = replaced(fork(("determistic=False):", "determistic=False, **more):")))
    assert len(step(V, X, 0.7, SIGMAS, 1, None)) == 5
    assert told.calls() == [0, 0, 1] and "it takes **more" in told.said[0]


def test_parameters_that_are_only_named() -> None:
    told, step = replaced(fork(("generator=None, determistic", "generator=None, *, determistic")))
    for _ in range(3):
        step(V, X, 0.7, SIGMAS, 1, None, determistic=True)
    assert told.calls() == [3, 0, 0]
    assert told.all.report()["functions"][0]["original_not_timed"] == ""
    with pytest.raises(TypeError, match="positional arguments but 8 were given"):
        step(V, X, 0.7, SIGMAS, 1, None, None, True)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.ours)
def test_every_known_function_has_parameters_that_are_told_apart(known: Known) -> None:
    layout = Layout(known.load())
    assert layout.names[layout.state] in STATE and layout.names[layout.output] in OUTPUT
    assert layout.next is not None and layout.step is not None


def test_what_cannot_stand_in_is_said() -> None:
    told = Told()
    method = staticmethod(STEP)
    assert told.stand_in(method) is method and told.stand_in(classmethod(len)) is not None
    assert "got a staticmethod, want a function or method" in told.said[0]
    assert told.stand_in(draw) is draw
    step = told.stand_in(STEP)
    assert told.stand_in(step) is step is told.stand_in(STEP)
    assert step.__wrapped__ is STEP and step.__name__ == "flow_grpo_step"


def test_an_error_of_ours_becomes_a_call_of_the_original() -> None:
    told, step = replaced()
    for wrong in ((1, 2), (V, X, 0.7, SIGMAS, 99, None)):
        with pytest.raises((TypeError, IndexError)):
            step(*wrong)
    step(V, X, 0.7, SIGMAS, 1, None)
    twice = SIGMAS[[0, 0, 1, 2, 3, 4]]
    assert step(V, X, 0.7, twice, 2, AFTER)[0] is AFTER
    assert "ours raised ValueError: sigmas: got" in told.said[-1]


@pytest.mark.parametrize("kind", ["one output for all", "latents with a gradient", "a sample with a gradient"])
def test_calls_beyond_ours_are_the_original_s_to_the_bit(kind: str) -> None:
    told, step = replaced()
    step(V, X, 0.7, SIGMAS, 1, None)
    v, x = V.clone(), X.clone()
    if kind == "one output for all":
        v = v[:1]
    (x if kind == "latents with a gradient" else v).requires_grad_(kind != "one output for all")
    found = []
    for function in (STEP, step):
        torch.manual_seed(5)
        found.append((function(v, x, 0.7, SIGMAS, 1, None), torch.get_rng_state()))
    assert all(map(torch.equal, found[0][0], found[1][0])) and torch.equal(found[0][1], found[1][1])
    assert [t.requires_grad for t in found[0][0]] == [t.requires_grad for t in found[1][0]]
    assert told.calls() == [1, 0, 1] and "such calls go to the original" in told.said[-1]
    with torch.no_grad():
        step(V, x, 0.7, SIGMAS, 1, None)
    assert told.calls() == [2, 0, 1]


SIDE_EFFECTS = {
    "LOG": "LOG.append(index)",
    "COUNTS": "COUNTS['steps'] = COUNTS.get('steps', 0) + 1",
    "TOTAL": "global TOTAL; TOTAL += 1",
    "latents in place": "latents.mul_(0.5)",
    "sigmas in place": "sigmas.mul_(0.5)",
}


@pytest.mark.parametrize("what", SIDE_EFFECTS)
def test_what_a_step_changes_is_changed_as_without_us(what: str) -> None:
    step = doing(SIDE_EFFECTS[what])
    scope, x, sigmas = step.__globals__, X.clone(), SIGMAS.clone()
    scope |= {"LOG": [], "COUNTS": {}, "TOTAL": 0}
    told, stand = replaced(step)
    for _ in range(2):
        stand(V, x, 0.7, sigmas, 1, AFTER)
    assert told.calls() == [0, 0, 2]
    assert f"it changes {what}" in told.said[-1]
    wanted = {"LOG": [1, 1], "COUNTS": {"steps": 2}, "TOTAL": 2}
    assert all(scope[name] == (value if name == what else type(value)()) for name, value in wanted.items())
    assert torch.equal(x, X * 0.25 if what == "latents in place" else X)
    assert torch.equal(sigmas, SIGMAS * 0.25 if what == "sigmas in place" else SIGMAS)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [1, 2, 3])  # a call by which the original is timed is recorded, or repeated, or both
def test_a_step_within_a_checkpoint(before: int, reentrant: bool) -> None:
    told, step = replaced()

    def loss(v: Tensor) -> Tensor:
        return step(v.tanh(), X, 0.7, SIGMAS, 1, AFTER)[2].sum()

    wanted, found = (V.clone().requires_grad_() for _ in range(2))
    for _ in range(before):
        wanted.grad = None
        loss(wanted).backward()
    checkpoint(loss, found, use_reentrant=reentrant).backward()
    assert torch.equal(found.grad, wanted.grad)
    assert told.calls() == [0, before + 2, 0]
    assert told.all.report()["functions"][0]["original_not_timed"] == ""


def test_an_error_of_who_watches_a_call_is_not_an_error_of_ours() -> None:
    class StopError(Exception): ...

    def stop(tensor: Tensor) -> Tensor:
        raise StopError

    told, step = replaced()
    v = V.clone().requires_grad_()
    with pytest.raises(StopError), torch.autograd.graph.saved_tensors_hooks(stop, stop):
        step(v, X, 0.7, SIGMAS, 1, AFTER)
    step(v, X, 0.7, SIGMAS, 1, AFTER)
    assert told.calls() == [0, 2, 0] and len(told.said) == 1


def test_gradients_positions_and_keywords() -> None:
    told, step = replaced()
    wanted = V.clone().requires_grad_()
    (want,) = torch.autograd.grad(mixgrpo.flow_grpo_step(wanted, X, 0.7, SIGMAS, 1, AFTER)[2].sum(), wanted)
    found = V.clone().requires_grad_()
    named = {"latents": X, "sigmas": SIGMAS, "index": 1, "prev_sample": AFTER, "eta": 0.7}
    (got,) = torch.autograd.grad(step(found, **named)[2].sum(), found)
    assert torch.equal(got, want) and told.calls() == [0, 1, 0]
    with pytest.raises(TypeError, match=r"flow_grpo_step\(\) got an unexpected keyword argument 'no'"):
        step(found, no=1, **named)


def test_it_is_pickled_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = PEERS["mixgrpo"]
    monkeypatch.setitem(sys.modules, peer.__name__, peer)
    step = Told().stand_in(peer.flow_grpo_step)
    monkeypatch.setattr(peer, "flow_grpo_step", step)
    assert pickle.loads(pickle.dumps(step)) is step


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_compiled_code_calls_it(first: str) -> None:
    told, step = replaced()
    if first == "eager":
        step(V, X, 0.7, SIGMAS, 1, None)

    @torch.compile(backend="eager")
    def loop(output: Tensor) -> Tensor:
        return step(output * 2, X, 0.7, SIGMAS, 1, AFTER)[2] * 2

    output = V.clone().requires_grad_()
    found = loop(output)
    want = mixgrpo.flow_grpo_step(V * 2, X, 0.7, SIGMAS, 1, AFTER)[2] * 2
    found.sum().backward()
    assert torch.equal(found, want) and output.grad is not None
    assert told.calls() == [int(first == "eager"), 1, 0]


def test_latents_are_rounded_before_they_are_scored() -> None:
    _, step = replaced(latents="bfloat16")
    after, _, sampled = step(V, X, 0.7, SIGMAS, 1, None)[:3]
    assert after.dtype == F32 and torch.equal(after, after.to(BF16).to(F32))
    scored = step(V, X, 0.7, SIGMAS, 1, after.to(BF16).to(F32))[2]
    assert torch.equal(sampled, scored)


def test_torch_is_not_needed_before_the_first_call() -> None:
    code = (
        "import sys\nfrom dancegrpo_fast.dropin.replaced import Replacements\n"
        "from dancegrpo_fast.dropin.settings import Settings\n"
        "def flux_step(): pass\n"
        "Replacements(Settings()).stand_in(flux_step, None, 'x')\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == "False\n", done.stderr
