"""Our schedulers for Flow-Factory: the project's own with another step, where the project is installed."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput

from dancegrpo_fast.compat import flow_factory

from ..tolerances import chain_error
from .cases import BF16, F32, PEERS, draw
from .real_peers import FOLDER

DOUBLES = PEERS["flow_factory"]
EULER, UNIPC = "FlowMatchEulerDiscreteSDEScheduler", "UniPCMultistepSDEScheduler"


@pytest.fixture
def installed() -> Iterator[ModuleType]:
    """`flow_factory.scheduler`, empty; what our module made of another one is forgotten."""
    module = ModuleType("flow_factory.scheduler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flow_factory", ModuleType("flow_factory"))
        patch.setitem(sys.modules, "flow_factory.scheduler", module)
        flow_factory._made.cache_clear()
        yield module
    flow_factory._made.cache_clear()


STATES = {"newest": EULER, "2026-03-21": "Of2026March21", "2026-03-14": "Of2026March14", "2026-01": "Of2026January"}


@pytest.mark.parametrize("state", STATES)
def test_our_class_is_theirs_with_another_step(state: str, installed: ModuleType) -> None:
    theirs = getattr(DOUBLES, STATES[state])
    setattr(installed, EULER, theirs)
    assert flow_factory.state_of(theirs) == state
    ours: Any = flow_factory.FlowMatchEulerDiscreteSDEScheduler
    assert ours is flow_factory.scheduler_class() and ours.__name__ == EULER
    assert issubclass(ours, theirs) and set(vars(ours)) - {"__module__", "__doc__"} == {"step"}
    results = []
    for kind in (ours, theirs):
        scheduler = kind(shift=3.0)
        scheduler.set_timesteps(4)
        torch.manual_seed(3)
        time = scheduler.timesteps[1]
        found = scheduler.step(draw(BF16, 1), time, draw(BF16, 2), noise_level=0.4, dynamics_type="Dance-SDE")
        results.append(found)
    for name in ("next_latents", "std_dev_t", "dt"):
        first, second = getattr(results[0], name), getattr(results[1], name)
        assert first.dtype == second.dtype and float((first - second).abs().max()) <= chain_error(second, BF16)
    assert results[0].next_latents.dtype == F32
    rounded = results[0].next_latents.bfloat16().float()
    assert torch.equal(rounded, results[0].next_latents) == flow_factory.STATES[state].rounded
    field = "velocity" if state == "newest" else "noise_pred"
    assert torch.equal(getattr(results[0], field), draw(BF16, 1).float())


def test_unipc_takes_its_own_step_in_evaluation(installed: ModuleType) -> None:
    theirs = DOUBLES.UniPCMultistepSDEScheduler
    setattr(installed, UNIPC, theirs)
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    results = []
    for kind in (flow_factory.UniPCMultistepSDEScheduler, theirs):
        scheduler = kind(**settings)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.numpy()  # diffusers makes it an array with a warning
        scheduler.set_timesteps(4)
        scheduler.is_eval = True
        x = draw(F32, 2)
        for i, time in enumerate(scheduler.timesteps):
            x = scheduler.step(draw(F32, i), float(time), x).next_latents
        results.append(x)
    assert torch.equal(*results)
    with pytest.raises(ValueError, match='name: got "x", want "FlowMatch'):
        flow_factory.scheduler_class("x")


@pytest.mark.parametrize(("name", "field"), [(EULER, "velocity"), (UNIPC, "noise_pred")])
def test_the_model_s_output_may_be_asked_for_off_the_schedule(name: str, field: str, installed: ModuleType) -> None:
    theirs = getattr(DOUBLES, name)
    setattr(installed, name, theirs)
    times = {"timestep": torch.tensor([333.0]), "timestep_next": torch.zeros(1)}
    asked = {**times, "noise_level": 0.0, "compute_log_prob": False, "return_kwargs": [field]}
    results, states = [], []
    for kind in (flow_factory.scheduler_class(name), theirs):
        scheduler, generator = kind(), torch.Generator().manual_seed(3)
        if name == UNIPC:
            scheduler.alphas_cumprod = scheduler.alphas_cumprod.numpy()  # diffusers makes it an array with a warning
        scheduler.set_timesteps(4)
        found = scheduler.step(draw(BF16, 1), latents=draw(F32, 2), generator=generator, **asked)
        results.append(getattr(found, field))
        states.append(generator.get_state())
    assert torch.equal(*results) and torch.equal(*states) and results[0].dtype == F32


def test_without_the_project_there_is_one_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flow_factory", None)
    flow_factory._made.cache_clear()
    scheduler = flow_factory.FlowMatchEulerDiscreteSDEScheduler(shift=3.0)
    assert scheduler.config.shift == 3.0 and scheduler.dynamics_type == "Flow-SDE"
    with pytest.raises(ImportError, match="flow_factory"):
        flow_factory.scheduler_class(UNIPC)
    with pytest.raises(AttributeError, match="has no attribute Missing"):
        getattr(flow_factory, "Missing")  # noqa: B009  # as `from flow_factory import Missing` does
    flow_factory._made.cache_clear()


def test_the_output_is_of_the_project_s_class(installed: ModuleType) -> None:
    @dataclass
    class SDESchedulerOutput(BaseOutput):
        next_latents: Any = None
        log_prob: Any = None

        @classmethod
        def from_dict(cls, data: dict[str, Any]) -> "SDESchedulerOutput":
            return cls(**{name: data[name] for name in ("next_latents", "log_prob") if name in data})

    setattr(installed, "SDESchedulerOutput", SDESchedulerOutput)  # noqa: B010  # a module made here
    theirs = type(EULER, (DOUBLES.FlowMatchEulerDiscreteSDEScheduler,), {"__module__": installed.__name__})
    setattr(installed, EULER, theirs)
    scheduler = flow_factory.scheduler_class()()
    scheduler.set_timesteps(4)
    found = scheduler.step(draw(F32, 1), scheduler.timesteps[1], draw(F32, 2), return_kwargs=["log_prob", "dt"])
    assert type(found) is SDESchedulerOutput and found.next_latents is None and found.log_prob.shape == (8,)


@pytest.mark.skipif(FOLDER is None, reason="DGF_PEERS names no folder with the projects' checkouts")
@pytest.mark.parametrize("name", [EULER, UNIPC])
def test_their_own_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(FOLDER or "") / "Flow-Factory" / "src"))
    theirs = getattr(pytest.importorskip("flow_factory.scheduler"), name)
    flow_factory._made.cache_clear()
    kind = flow_factory.scheduler_class(name)
    settings = {} if name == EULER else {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = kind(noise_level=0.5, num_sde_steps=2, **settings)
    if name == UNIPC:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.numpy()
    assert isinstance(scheduler, theirs) and not getattr(kind, "__abstractmethods__", None)
    scheduler.set_timesteps(4)
    scheduler.rollout()
    times, levels = scheduler.timesteps, scheduler.get_noise_levels()
    following = torch.cat([times[1:], times.new_zeros(1)])
    for i in range(4):
        given = {"timestep_next": following[i], "noise_level": float(levels[i])}
        found = scheduler.step(draw(BF16, 1), times[i], draw(BF16, 2), **given)
        again = scheduler.step(draw(BF16, 1), times[i], draw(BF16, 2), found.next_latents, **given)
        assert torch.equal(found.log_prob, again.log_prob) and "flow_factory" in type(found).__module__
    flow_factory._made.cache_clear()
