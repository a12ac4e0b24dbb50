"""What stands in for a function: recognised by what it does, at its first call, without a trace."""

import random
import warnings

import numpy as np
import pytest
import torch

from dancegrpo_fast.compat import mixgrpo

from ..compat.cases import BF16, CASES, F32, PEERS, SIGMAS, ddim_scheduler, draw, seeded
from ..compat.real_peers import FOLDER, ROWS, Real
from ..release import release_but
from .told import AFTER, Told, V, X, doing, fork, replaced


@pytest.mark.parametrize("dtype", release_but((BF16,), [F32, BF16]))
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
LEVEL = "    dt = n - s\n    level"
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
    "its own last step": (LEVEL, f"    n = n + (0.01 if n == 0 else 0)\n{LEVEL}"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_function_that_does_something_else_goes_on_as_it_is(name: str) -> None:
    original, told = fork(OTHERS[name]), Told()
    step = told.stand_in(original)
    for after in (None, AFTER):
        found, wanted = (seeded(5, f, V, X, 0.7, SIGMAS, 1, after) for f in (step, original))
        for got, want in zip(found, wanted, strict=True):
            assert got is want or torch.equal(got, want)
    assert told.calls() == [0, 0, 2]
    (line,) = told.said
    assert line.startswith("x.py:1 flow_grpo_step: not replaced: closest is dancegrpo_fast.compat."), line
    assert " step " in line and ("sampling" in line or "scoring" in line), line


def test_the_difference_is_named_where_it_is() -> None:
    told, step = replaced(fork(("log(2 * math.pi)", "log(2.2 * math.pi)")))
    step(V, X, 0.7, SIGMAS, 1, None)
    assert "output 2 (log-probability) is off by 0.0477, of which rounding explains" in told.said[0]


@pytest.mark.parametrize(
    ("error", "said"), [("KeyError('lost')", "KeyError: 'lost'"), ("SystemExit(3)", "SystemExit: 3")]
)
def test_an_original_that_raises_is_left_to_do_so(error: str, said: str) -> None:
    told, step = replaced(doing(f"raise {error}"))
    with pytest.raises((KeyError, SystemExit)):
        step(V, X, 0.7, SIGMAS, 1, None)
    assert f"the original raises {said}" in told.said[0]


def test_nothing_is_left_behind(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = "import random, warnings, numpy, logging; random.random(); numpy.random.rand(); print('heard'); "
    noisy += "warnings.warn('heard'); logging.getLogger('x').error('heard')"
    told, step = replaced(doing(noisy))
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
    counting = ("    shape = (-1", "    self.calls, self.seen[0] = self.calls + 1, 1\n    shape = (-1")
    told, step = replaced(fork(counting, name="ddim_step_with_logprob", of="ddpo"))
    scheduler, times = ddim_scheduler(), torch.tensor([901, 701, 501, 401, 301, 201, 101, 801])
    scheduler.calls, scheduler.seen = 0, [0]
    step(scheduler, V, times, X, eta=1.0)
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
    outer = doing("other(model_output, latents, 0.3, sigmas, index, latents, True, True)")
    outer.__globals__["other"] = told.stand_in(fork(name="dance_grpo_step"))
    step = told.stand_in(outer)
    for _ in range(5):
        step(V, X, 0.7, SIGMAS, 1, AFTER)
    # Only what the script itself calls counts, and what is called on the side waits for nothing.
    assert told.calls() == [0, 5, 0] and len(told.said) == 1
    assert told.all.report()["functions"][0]["original_not_timed"] == ""
