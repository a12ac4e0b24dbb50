"""verl-omni's scheduler, losses and engine with our parts in them, against its own."""

import functools
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from ..compat.cases import seeded
from ..patch.models import TINY
from ..tolerances import assert_same_sample, assert_within_budget, chain_error
from . import engines

SHAPE = (4, 5, 6)
KINDS = ("sde", "cps", "dance_sde")


@pytest.fixture
def kept(monkeypatch):
    """The scheduler's own method, as it is before the plug-in comes."""
    found = {}
    before = engines.verl_omni

    def keeping(kind: str) -> None:
        before(kind)
        scheduler = sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler
        found["step"] = scheduler.sample_previous_step
        found["loss"] = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].FlowGRPOLoss
        found["build"] = sys.modules["verl_omni.workers.engine.fsdp.diffusers_impl"].DiffusersFSDPEngine._build_module

    monkeypatch.setattr(engines, "verl_omni", keeping)
    return found


def scheduler(index: int = 2):
    made = sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler(shift=3.0)
    made.set_timesteps(8)
    made._step_index = index
    return made


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, 3, 6])
def test_steps(kept, verl_omni, kind: str, index: int) -> None:
    made, sample, output = scheduler(index), draw(1), draw(2)
    settings = {"sample": sample, "model_output": output, "sde_type": kind, "noise_level": 0.6, "return_sqrt_dt": True}
    found = seeded(5, made.sample_previous_step, **settings)
    plain = seeded(5, kept["step"], made, **settings)
    assert [v.shape for v in found] == [v.shape for v in plain]
    times = made.timesteps[[index] * SHAPE[0]]
    output = output.requires_grad_()
    again = made.sample_previous_step(
        sample, output, timestep=times, prev_sample=found[0], sde_type=kind, noise_level=0.6
    )
    assert torch.equal(torch.exp(again[1] - found[1]), torch.ones(SHAPE[0])) and again[1].requires_grad
    wide = engines.FlowMatchSDEDiscreteScheduler(shift=3.0)
    wide.set_timesteps(8)
    wide.sigmas, wide._step_index = wide.sigmas.double(), index
    exact = engines.FlowMatchSDEDiscreteScheduler.sample_previous_step(
        wide, **settings | {"sample": sample.double(), "model_output": draw(2).double()}, prev_sample=found[0].double()
    )
    again = kept["step"](made, **settings, prev_sample=found[0])
    for place in (1, 2):
        assert_within_budget(found[place], exact[place], again[place])
    for place in (3, 4):
        one, want = found[place].flatten()[:1], exact[place].flatten()[:1].double()
        assert_within_budget(one, want, again[place].flatten()[:1], chain_error(want, torch.float32))
    noise = plain[0].double() - plain[2].double()
    assert_within_budget(found[0], exact[2] + noise, plain[0], float((plain[2].double() - exact[2]).abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_requests_are_ours_too(kept, verl_omni, kind: str) -> None:
    """Samples outside of their windows have level 0; in it they are what one level for all gives, to the bit."""
    made, levels = scheduler(), torch.tensor([0.6, 0.0, 0.6, 0.35]).reshape(-1, 1, 1)
    settings = {"sample": draw(1), "model_output": draw(2), "sde_type": kind, "return_sqrt_dt": True}
    found = seeded(5, made.sample_previous_step, **settings, noise_level=levels)
    state = torch.get_rng_state()
    plain = seeded(5, kept["step"], made, **settings, noise_level=levels)
    assert torch.equal(state, torch.get_rng_state())
    assert [(v.shape, v.dtype) for v in found] == [(v.shape, v.dtype) for v in plain]
    assert_same_sample(found[0], plain[0])
    assert_same_sample(found[2], plain[2])
    for row in (0, 2, 3):
        level = round(levels[row].item(), 2)
        alone = seeded(5, made.sample_previous_step, **settings, noise_level=level)
        assert torch.equal(found[0][row], alone[0][row]) and torch.equal(found[1][row], alone[1][row])
        times = made.timesteps[[2] * SHAPE[0]]
        again = made.sample_previous_step(
            draw(1), draw(2), timestep=times, prev_sample=found[0], sde_type=kind, noise_level=level
        )
        assert torch.equal(again[1][row], found[1][row])
    assert torch.isfinite(found[1]).all()


def test_another_arithmetic_stays(kept, capsys, monkeypatch, request) -> None:
    peer = engines.verl_peer.FlowMatchSDEDiscreteScheduler
    before = peer.sample_previous_step

    @functools.wraps(before)
    def louder(*args, **kwargs):
        after, *rest = before(*args, **kwargs)
        return (1.01 * after, *rest)

    monkeypatch.setattr(peer, "sample_previous_step", louder)
    request.getfixturevalue("small_verl_omni")
    made, settings = scheduler(), {"sample": draw(1), "model_output": draw(2)}
    for level in (torch.tensor([0.6, 0.0, 0.6, 0.35]).reshape(-1, 1, 1), 0.6):
        steps = (made.sample_previous_step, functools.partial(louder, made))
        assert torch.equal(*(seeded(5, step, **settings, noise_level=level)[0] for step in steps))
    assert "not replaced: " in capsys.readouterr().err


def test_what_is_not_ours_goes_to_theirs(kept, small_verl_omni, capsys) -> None:
    made, settings = scheduler(), {"sample": draw(1), "model_output": draw(2)}
    times, level = made.timesteps[[2] * SHAPE[0]], torch.full((SHAPE[0], 1, 1), 0.5)
    replay = {"timestep": times, "prev_sample": draw(3), "noise_level": level}
    for changes in ({"per_token_timesteps": torch.zeros(1)}, replay):
        for _ in range(2):
            steps = (made.sample_previous_step, functools.partial(kept["step"], made))
            assert all(map(torch.equal, *(seeded(5, step, **settings, **changes) for step in steps)))
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == [
        "per_token_timesteps go to verl-omni's own",
        "a tensor for noise_level in a replay goes to verl-omni's own",
    ]


def loss_case(seed: int):
    drawn = torch.Generator().manual_seed(seed)
    old, new = (torch.randn(16, generator=drawn) for _ in range(2))
    settings = SimpleNamespace(clip_ratio=1e-4, adv_clip_max=1.5)
    weights = torch.randint(0, 2, (16,), generator=drawn).float()
    return {
        "old_log_prob": old,
        "log_prob": old + 2e-4 * new,
        "advantages": 2 * torch.randn(16, generator=drawn),
        "config": SimpleNamespace(diffusion_loss=settings),
    }, weights


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["flow_grpo", "dance_grpo"])
def test_loss(kept, verl_omni, name: str, weighted: bool) -> None:
    algorithms = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"]
    ours, theirs = algorithms.DIFFUSION_LOSS_REGISTRY[name], kept["loss"]()
    assert type(ours) is not kept["loss"] and isinstance(ours, kept["loss"])
    case, weights = loss_case(3)
    found = []
    for loss, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        log_prob = case["log_prob"].to(dtype).requires_grad_()
        data = {"old_log_probs": case["old_log_prob"].to(dtype), "advantages": case["advantages"].to(dtype)}
        data |= {"rollout_is_weights": weights.to(dtype)} if weighted else {}
        result = loss(config=case["config"], model_output={"log_probs": log_prob}, data=data)
        found.append((result, torch.autograd.grad(result.loss, log_prob)[0]))
        assert result.add_loss_metric is False
    (mine, grad), (plain, plain_grad), (exact, exact_grad) = found
    source = chain_error(exact.loss.detach(), torch.float32)
    assert_within_budget(mine.loss.detach(), exact.loss.detach(), plain.loss.detach(), source)
    assert_within_budget(grad, exact_grad, plain_grad)
    assert list(mine.metrics) == list(plain.metrics)
    for key, value in plain.metrics.items():
        want = torch.tensor(exact.metrics[key], dtype=torch.float64)
        source = chain_error(torch.ones(1), torch.float32)
        assert_within_budget(torch.tensor(mine.metrics[key]), want, torch.tensor(value), source)


def test_another_loss_of_that_name_stays(kept, small_verl_omni, capsys) -> None:
    algorithms = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"]

    class Own(kept["loss"]):
        pass

    algorithms.register_diffusion_loss("flow_grpo")(Own)
    capsys.readouterr()
    importlib.import_module("dancegrpo_fast.plugins.verl_omni_parts").loss()
    assert type(algorithms.DIFFUSION_LOSS_REGISTRY["flow_grpo"]) is Own
    assert f'the loss "flow_grpo" stays, got a {__name__}' in capsys.readouterr().err


def test_everything_goes_in_once_and_is_said(kept, capsys, request) -> None:
    request.getfixturevalue("small_verl_omni")
    assert capsys.readouterr().err.splitlines() == [
        "dancegrpo-fast: verl-omni: FlowMatchSDEDiscreteScheduler.sample_previous_step is held against our step at its"
        " first call",
        'dancegrpo-fast: verl-omni: our loss as "flow_grpo", "dance_grpo"',
    ]
    parts = importlib.import_module("dancegrpo_fast.plugins.verl_omni_parts")
    made = sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler
    engine = sys.modules["verl_omni.workers.engine.fsdp.diffusers_impl"].DiffusersFSDPEngine
    held = made.sample_previous_step, engine._build_module
    for put in (parts.step, parts.loss, parts.blocks):
        put()
    assert held == (made.sample_previous_step, engine._build_module)
    assert held[0].__wrapped__ is kept["step"] and held[1].__wrapped__ is kept["build"]
    settings = {"sample": draw(1), "model_output": draw(2)}
    for _ in range(2):
        scheduler().sample_previous_step(**settings)
    method = "FlowMatchSDEDiscreteScheduler.sample_previous_step"
    assert capsys.readouterr().err.splitlines() == [
        f"dancegrpo-fast: {kept['step'].__module__} {method} -> dancegrpo_fast.compat.verl_omni.{method} (verl-omni)"
    ]


def test_workers_that_are_spawned_get_the_step(kept, small_verl_omni) -> None:
    base = sys.modules["verl_omni.pipelines.model_base"].VllmOmniPipelineBase
    assert base.get_pipeline_path(architecture="none", algorithm="flow_grpo") is None
    path = base.get_pipeline_path("SD3", "flow_grpo")
    # As a worker does, in which nothing of ours was imported.
    engines.forget("dancegrpo_fast.plugins")
    sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler.sample_previous_step = kept["step"]
    home, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(home), name) is engines.Pipeline
    made = sys.modules["verl_omni.pipelines.schedulers"].FlowMatchSDEDiscreteScheduler
    assert made.sample_previous_step is not kept["step"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = small_verl_omni.nothing


def test_blocks(small_verl_omni, capsys, monkeypatch) -> None:
    engine = sys.modules["verl_omni.workers.engine.fsdp.diffusers_impl"].DiffusersFSDPEngine
    model, inputs = TINY["flux"].model(), TINY["flux"].inputs()
    plain = model(**inputs).sample
    monkeypatch.setattr(engine, "make", lambda self: model)
    assert engine()._build_module() is model
    assert any("forward" in vars(block) for block in model.transformer_blocks)
    assert torch.equal(model(**inputs).sample, plain)
    monkeypatch.setattr(engine, "make", lambda self: torch.nn.Identity())
    engine()._build_module()
    said = capsys.readouterr().err
    assert 'verl-omni: block ops, "lossless", in a FluxTransformer2DModel' in said
    assert "verl-omni: no block ops, transformer: got torch.nn.modules.linear.Identity, want one of" in said
