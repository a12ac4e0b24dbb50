"""What stands in for a function: recognised by what it does, at its first call, without a trace."""

import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dancegrpo_fast.compat import mixgrpo
from dancegrpo_fast.dropin.known import KNOWN, Known
from dancegrpo_fast.dropin.replaced import Replacements
from dancegrpo_fast.dropin.roles import OUTPUT, STATE, Layout
from dancegrpo_fast.dropin.settings import Settings

from ..compat.cases import BF16, CASES, F32, PEERS, SIGMAS, ddim_scheduler, draw
from ..compat.real_peers import FOLDER, ROWS, Real
from ..processes import LIMIT

SOURCE = Path(PEERS["mixgrpo"].__file__).read_text()
V, X, AFTER = draw(F32, 1), draw(F32, 2), draw(F32, 3)


class Told:
    """Replacements that say what they say to a list."""

    def __init__(self, **settings: Any) -> None:
        self.said: list[str] = []
        self.all = Replacements(Settings(**settings), self.said.append)

    def stand_in(self, function: Any, owner: str | None = None) -> Any:
        return self.all.stand_in(function, owner, "x.py:1")

    def taken(self) -> list[Known]:
        """Which of ours stand in."""
        return [known for d in self.all.definitions if d.dispatch is not None for known in d.dispatch.taken]

    def calls(self) -> list[int]:
        """Rollouts, replays, and calls of the original."""
        (dispatch,) = [d.dispatch for d in self.all.definitions if d.dispatch is not None]
        return [*dispatch.meter.calls, sum(dispatch.kept.values())]


def fork(*edits: tuple[str, str], name: str = "flow_grpo_step") -> Callable[..., Any]:
    """MixGRPO's step with its source changed."""
    text = SOURCE
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    module = ModuleType("fork")
    exec(compile(text, "fork.py", "exec"), vars(module))
    return getattr(module, name)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", CASES)
def test_every_peer_is_recognised_by_what_it_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, told = CASES[name], Told()
    home, attribute = case.place
    owner = home.__name__ if isinstance(home, type) else None
    monkeypatch.setattr(home, attribute, told.stand_in(vars(home)[attribute], owner))
    x = draw(case.latents, 2)
    v = draw(dtype, 1)
    found = case.peer(v, x, None)
    scored = case.peer(v, x, found["next"])
    assert torch.equal(scored["log_prob"], case.ours(v, x, found["next"])["log_prob"])
    assert told.calls() == [1, 1, 0], told.said
    (taken,) = told.taken()
    # Of states that do the same here the first is taken.
    assert taken.options == case.options
    (line,) = told.said
    assert f"-> dancegrpo_fast.compat.{case.ours_name.replace(':', '.')} " in line


OWNERS = {
    "step": "FlowMatchEulerDiscreteSDEScheduler",
    "UniPC.step": "UniPCMultistepSDEScheduler",
    "sample_previous_step": "FlowMatchSDEDiscreteScheduler",
}


@pytest.mark.skipif(FOLDER is None, reason="DGF_PEERS names no folder with the projects' checkouts")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_project_s_own_function_is_recognised(row: Real) -> None:
    theirs, told = row.theirs(), Told()
    if theirs is None:
        pytest.skip(f"{row.path} of {row.project} at {row.commit or 'its checkout'} is not to be had")
    step = told.stand_in(theirs, OWNERS.get(row.name))
    fixed = {name: value for name, value in row.options.items() if name == "dynamics_type"}
    for dtype in (F32, BF16):
        for place in row.steps:
            v, x = draw(dtype, place, row.shape), draw(row.latents, 9, row.shape)
            after = row.call(step, v, x, None, place, **fixed)[0]
            row.call(step, v, x, after, place, **fixed)
    assert told.calls() == [2 * len(row.steps), 2 * len(row.steps), 0], told.said
    assert {known.ours for known in told.taken()} == {row.ours_name}


LAST = "log_prob.flatten(1).mean(dim=1), mean, tau"
SCORE = "log_prob = -((prev_sample.detach() - mean) ** 2)"
OTHERS = {
    "no constant": (" - 0.5 * math.log(2 * math.pi)", ""),
    "no root of dt": ("tau = level * torch.sqrt(-dt)", "tau = level"),
    "another mean": ("(1 - s) / (2 * s))", "(1 - s) / (2.1 * s))"),
    "another clamp": ("torch.where(s == 1,", "torch.where(s > 0.7,"),
    "a sum": (LAST, LAST.replace("mean(dim", "sum(dim")),
    "no gradient": (LAST, LAST.replace("log_prob", "log_prob.detach()")),
    "half a gradient": (SCORE, f"mean = (mean + mean.detach()) / 2\n    {SCORE}"),
    "less returned": (LAST, LAST.removesuffix(", tau")),
    "None returned": (LAST, LAST.replace("tau", "None")),
    "another dtype": (LAST, LAST.replace("mean,", "mean.double(),")),
    "another shape": (LAST, LAST.replace("tau", "tau[None]")),
    "more noise drawn": ("noise = torch_utils", "torch.randn(1); noise = torch_utils"),
    "its own last step": (
        "    dt = n - s\n    level",
        "    n = n + (0.01 if n == 0 else 0)\n    dt = n - s\n    level",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_function_that_does_something_else_goes_on_as_it_is(name: str) -> None:
    original, told = fork(OTHERS[name]), Told()
    step = told.stand_in(original)
    for after in (None, AFTER):
        torch.manual_seed(5)
        found = step(V, X, 0.7, SIGMAS, 1, after)
        torch.manual_seed(5)
        for got, want in zip(found, original(V, X, 0.7, SIGMAS, 1, after), strict=True):
            assert got is want or torch.equal(got, want)
    assert told.calls() == [0, 0, 2]
    (line,) = told.said
    assert line.startswith("x.py:1 flow_grpo_step: not replaced: closest is dancegrpo_fast.compat."), line
    assert " step " in line and ("sampling" in line or "scoring" in line), line


def test_the_difference_is_named_where_it_is() -> None:
    told = Told()
    told.stand_in(fork(("log(2 * math.pi)", "log(2.2 * math.pi)")))(V, X, 0.7, SIGMAS, 1, None)
    assert "output 2 (log-probability) is off by 0.0477, of which rounding explains" in told.said[0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (fork(("device = model_output.device", "raise KeyError('lost')")), "the original raises KeyError: 'lost'"),
        (fork(("device = model_output.device", "raise SystemExit(3)")), "the original raises SystemExit: 3"),
    ],
)
def test_an_original_that_raises_is_left_to_do_so(function: Callable[..., Any], reason: str) -> None:
    told = Told()
    with pytest.raises((KeyError, SystemExit)):
        told.stand_in(function)(V, X, 0.7, SIGMAS, 1, None)
    assert reason in told.said[0]


def test_nothing_is_left_behind(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = "import random, warnings, numpy, logging; random.random(); numpy.random.rand(); print('heard'); "
    noisy += "warnings.warn('heard'); logging.getLogger('x').error('heard'); device = model_output.device"
    told = Told()
    step = told.stand_in(fork(("    device = model_output.device", f"    {noisy}")))
    torch.manual_seed(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs have other random numbers"))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(record=True) as warned, torch.device("meta"), torch.autocast("cpu", BF16):
            with torch.inference_mode():
                found = step(V, X, 0.7, SIGMAS, 1, AFTER)
                assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu") and torch.empty(1).device.type == "meta"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert not warned and capfd.readouterr() == ("", "") and told.calls() == [0, 1, 0]
    assert torch.equal(found[2], mixgrpo.flow_grpo_step(V, X, 0.7, SIGMAS, 1, AFTER)[2])


def test_a_scheduler_is_not_touched() -> None:
    source = Path(PEERS["ddpo"].__file__).read_text()
    module = ModuleType("fork")
    exec(
        source.replace("    shape = (-1", "    self.calls, self.seen[0] = self.calls + 1, 1\n    shape = (-1"),
        vars(module),
    )
    scheduler, times = ddim_scheduler(), torch.tensor([901, 701, 501, 401, 301, 201, 101, 801])
    scheduler.calls, scheduler.seen = 0, [0]
    told = Told()
    told.stand_in(module.ddim_step_with_logprob)(scheduler, V, times, X, eta=1.0)
    # It counts its calls, and ours does not: that is a difference.
    assert (scheduler.calls, scheduler.seen) == (1, [1])
    assert "it leaves other values than ours in self.calls" in told.said[0]


def test_a_schedule_of_inference_mode() -> None:
    told, x, kind = Told(), X, PEERS["verl_omni"].FlowMatchSDEDiscreteScheduler
    step = told.stand_in(kind.sample_previous_step, kind.__name__)
    with torch.inference_mode():
        scheduler = kind(shift=3.0)
        scheduler.set_timesteps(4)
        for scheduler._step_index in range(4):
            x = step(scheduler, x, V, sde_type="dance_sde")[0]
    assert told.calls() == [4, 0, 0], told.said


def test_an_original_that_calls_another_one() -> None:
    told = Told()
    inner = fork(name="dance_grpo_step")
    outer = fork(
        (
            "    device = model",
            "    other(model_output, latents, 0.3, sigmas, index, latents, True, True)\n    device = model",
        )
    )
    outer.__globals__["other"] = told.stand_in(inner)
    step = told.stand_in(outer)
    for _ in range(5):
        step(V, X, 0.7, SIGMAS, 1, AFTER)
    # Only what the script itself calls counts, and what is called on the side waits for nothing.
    assert told.calls() == [0, 5, 0] and len(told.said) == 1
    assert told.all.report()["functions"][0]["original_not_timed"] == ""


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
    original, calls = counted(PEERS["mixgrpo"].flow_grpo_step)
    told = Told()
    step = told.stand_in(original)
    step(V, X, 0.7, SIGMAS, 1, None)
    first = len(calls)
    step(V, X, 0.5, SIGMAS, 2, None)  # the second call is also timed beside the original, after it was called once
    step(V, X, 0.1, SIGMAS, 0, AFTER)
    assert first > 10 and len(calls) == first + 2
    step(V, X, 0.5, SIGMAS, 2, AFTER, determistic=True)
    assert len(calls) > first + 12 and len(told.said) == 1


def test_a_flag_may_choose_what_ours_does_not() -> None:
    text = ("prev_sample = latents + dt * model_output", "prev_sample = latents - dt * model_output")
    told = Told()
    step = told.stand_in(fork(text))
    step(V, X, 0.7, SIGMAS, 1, None)
    step(V, X, 0.7, SIGMAS, 1, None, determistic=True)
    assert told.calls() == [1, 0, 1] and "not replaced" in told.said[1]


def test_too_many_ways_go_to_the_original() -> None:
    told = Told()
    step = told.stand_in(fork(("determistic=False)", "determistic=False, mode='')")))
    for i in range(40):
        step(V, X, 0.7, SIGMAS, 1, AFTER, mode="" if i % 2 else str(i))
    assert told.calls()[2] >= 20 and told.calls()[1] > 0


def test_an_argument_that_ours_lacks_goes_to_the_original_where_it_is_given() -> None:
    told = Told()
    step = told.stand_in(fork(("determistic=False):", "determistic=False, scale=1.0):\n    latents = latents * scale")))
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
    told = Told()
    original = fork(("determistic=False):", "determistic=False, **more):"))
    step = told.stand_in(original)
    assert len(step(V, X, 0.7, SIGMAS, 1, None)) == 5
    assert told.calls() == [0, 0, 1] and "it takes **more" in told.said[0]


def test_parameters_that_are_only_named() -> None:
    told = Told()
    step = told.stand_in(fork(("generator=None, determistic", "generator=None, *, determistic")))
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
    method = staticmethod(PEERS["mixgrpo"].flow_grpo_step)
    assert told.stand_in(method) is method and told.stand_in(classmethod(len)) is not None
    assert "got a staticmethod, want a function or method" in told.said[0]
    assert told.stand_in(draw) is draw
    step = told.stand_in(PEERS["mixgrpo"].flow_grpo_step)
    assert told.stand_in(step) is step is told.stand_in(PEERS["mixgrpo"].flow_grpo_step)
    assert step.__wrapped__ is PEERS["mixgrpo"].flow_grpo_step and step.__name__ == "flow_grpo_step"


def test_an_error_of_ours_becomes_a_call_of_the_original() -> None:
    told = Told()
    step = told.stand_in(PEERS["mixgrpo"].flow_grpo_step)
    for wrong in ((1, 2), (V, X, 0.7, SIGMAS, 99, None)):
        with pytest.raises((TypeError, IndexError)):
            step(*wrong)
    step(V, X, 0.7, SIGMAS, 1, None)
    twice = SIGMAS[[0, 0, 1, 2, 3, 4]]
    assert step(V, X, 0.7, twice, 2, AFTER)[0] is AFTER
    assert "ours raised ValueError: sigmas: got" in told.said[-1]


@pytest.mark.parametrize("kind", ["one output for all", "latents with a gradient", "a sample with a gradient"])
def test_calls_beyond_ours_are_the_original_s_to_the_bit(kind: str) -> None:
    told, peer = Told(), PEERS["mixgrpo"].flow_grpo_step
    step = told.stand_in(peer)
    step(V, X, 0.7, SIGMAS, 1, None)
    v, x = V.clone(), X.clone()
    if kind == "one output for all":
        v = v[:1]
    (x if kind == "latents with a gradient" else v).requires_grad_(kind != "one output for all")
    found = []
    for function in (peer, step):
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
    head = "    device = model_output.device\n"
    step = fork((head, f"    {SIDE_EFFECTS[what]}\n{head}"))
    scope, told = step.__globals__, Told()
    scope |= {"LOG": [], "COUNTS": {}, "TOTAL": 0}
    x, sigmas = X.clone(), SIGMAS.clone()
    stand = told.stand_in(step)
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
    told = Told()
    step = told.stand_in(PEERS["mixgrpo"].flow_grpo_step)

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

    told = Told()
    step = told.stand_in(PEERS["mixgrpo"].flow_grpo_step)
    v = V.clone().requires_grad_()
    with pytest.raises(StopError), torch.autograd.graph.saved_tensors_hooks(stop, stop):
        step(v, X, 0.7, SIGMAS, 1, AFTER)
    step(v, X, 0.7, SIGMAS, 1, AFTER)
    assert told.calls() == [0, 2, 0] and len(told.said) == 1


def test_gradients_positions_and_keywords() -> None:
    told = Told()
    step = told.stand_in(PEERS["mixgrpo"].flow_grpo_step)
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
    told = Told()
    step = told.stand_in(PEERS["mixgrpo"].flow_grpo_step)
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
    told = Told(latents="bfloat16")
    step = told.stand_in(PEERS["mixgrpo"].flow_grpo_step)
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
