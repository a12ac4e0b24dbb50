"""Flow-Factory's scheduler with our step against its own; its accelerators and adapters with ours in place."""

import contextlib
import importlib
import inspect
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from dancegrpo_fast.activations import checkpointing

from ..compat.cases import seeded
from ..models.folders import save_flux
from ..patch.models import TINY, assert_same_bits, run
from ..release import release_but
from ..tolerances import assert_same_sample, assert_within_budget, chain_error
from . import engines

SHAPE = (4, 5, 6)
DYNAMICS = ("Flow-SDE", "Dance-SDE", "CPS")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob")


def theirs():
    return sys.modules["flow_factory.scheduler"].FlowMatchEulerDiscreteSDEScheduler


def ready(cls, **settings):
    made = cls(**settings)
    made.set_timesteps(6)
    return made


def call(scheduler, index: int, dtype: torch.dtype, **changes):
    drawn = torch.Generator().manual_seed(index)
    times = torch.cat([scheduler.timesteps.float(), torch.zeros(1)])
    output = torch.randn(SHAPE, generator=drawn).to(torch.bfloat16)
    given = {
        next(iter(inspected(type(scheduler)))): output,
        "timestep": times[index],
        "timestep_next": times[index + 1],
        "latents": torch.randn(SHAPE, generator=drawn).to(dtype),
        "noise_level": 0.7,
    }
    return given | changes


def inspected(cls):
    """The step's parameters after `self`: what a model predicts has had two names."""
    return list(inspect.signature(cls.step).parameters)[1:]


def fields(found) -> dict[str, torch.Tensor]:
    return {name: getattr(found, name) for name in FIELDS}


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("dtype", release_but(DTYPES[1:2], DTYPES))
def test_steps(flow_factory, capsys, dynamics: str, dtype: torch.dtype) -> None:
    ours = ready(flow_factory.FlowMatchEulerDiscreteSDEScheduler, dynamics_type=dynamics)
    plain = ready(theirs(), dynamics_type=dynamics)
    for index in (0, 2, 4):
        given = call(ours, index, dtype)
        found = []
        for scheduler in (ours, plain):
            found.append(fields(seeded(5, scheduler.step, **given)) | {"state": torch.get_rng_state()})
        mine, other = found
        assert torch.equal(mine.pop("state"), other.pop("state"))
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
        assert_on_policy(ours, given, mine)
        scored = plain.step(**given | {"next_latents": mine["next_latents"]})
        exact = truth(dynamics, given, mine["next_latents"])
        for key in ("next_latents_mean", "log_prob"):
            assert_within_budget(mine[key], getattr(exact, key), getattr(scored, key))
        for key in ("std_dev_t", "dt"):
            one, want = mine[key].flatten()[:1], getattr(scored, key).flatten()[:1]
            assert_within_budget(one, want.double(), want, chain_error(want.double(), torch.float32))
        sampled = seeded(5, truth, dynamics, given).next_latents
        rounding = 0.0 if dtype == torch.float32 else chain_error(sampled, dtype)
        assert_within_budget(mine["next_latents"], sampled, other["next_latents"], rounding)
    method = f"{theirs().step.__module__} FlowMatchEulerDiscreteSDEScheduler.step"
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"dancegrpo-fast: {method} -> dancegrpo_fast.compat.flow_factory.")


def test_the_scheduler_of_wan(flow_factory) -> None:
    """Its own class in Flow-Factory, with the same steps."""
    real = "flow_factory.scheduler.abc" in sys.modules
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0} if real else {}
    plain = sys.modules["flow_factory.scheduler"].UniPCMultistepSDEScheduler
    assert issubclass(flow_factory.UniPCMultistepSDEScheduler, plain)
    ours, other = (ready(cls, **flow) for cls in (flow_factory.UniPCMultistepSDEScheduler, plain))
    given = call(ours, 2, torch.bfloat16)
    found = [fields(seeded(5, scheduler.step, **given)) for scheduler in (ours, other)]
    for key in ("next_latents_mean", "std_dev_t", "dt", "log_prob"):
        assert_same_sample(found[0][key], found[1][key])
    assert_on_policy(ours, given, found[0])


def assert_on_policy(scheduler, given: dict, rolled: dict) -> None:
    """Trained on as it was stored, in the latents' dtype, with a timestep for each sample: a ratio of 1."""
    each = {name: given[name].expand(SHAPE[0]) for name in ("timestep", "timestep_next")}
    name = inspected(type(scheduler))[0]
    output = given[name].clone().requires_grad_()
    stored = rolled["next_latents"].to(given["latents"].dtype)
    again = scheduler.step(**given | each | {name: output, "next_latents": stored})
    assert again.log_prob.requires_grad
    assert torch.equal(torch.exp(again.log_prob - rolled["log_prob"]), torch.ones(SHAPE[0]))


def truth(dynamics: str, given: dict, next_latents: torch.Tensor | None = None):
    wide = ready(engines.FlowMatchEulerDiscreteSDEScheduler, dynamics_type=dynamics)
    wide.sigmas = wide.sigmas.double()
    output = given.get("noise_pred", given.get("velocity"))
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items() if v is not output}
    after = None if next_latents is None else next_latents.double()
    return wide.step(output.double(), **double, next_latents=after)


@pytest.mark.parametrize("way", ["off the schedule", "kept", "evaluation"])
def test_what_is_not_scored_is_theirs(flow_factory, capsys, way: str) -> None:
    """Trainers without a ratio ask for the model's output at times that no schedule has."""
    ours, plain = ready(flow_factory.FlowMatchEulerDiscreteSDEScheduler), ready(theirs())
    name = inspected(type(ours))[0]
    changes = {"compute_log_prob": False, "return_kwargs": [name, "next_latents"]}
    if way == "off the schedule":
        changes |= {"timestep": torch.tensor(333.0), "timestep_next": torch.tensor(0.0)}
    if way == "evaluation":
        changes |= {"return_kwargs": [name, "next_latents_mean"]}
        ours.eval()
        plain.eval()
    found = [seeded(5, one.step, **call(one, 1, torch.bfloat16, **changes)) for one in (ours, plain)]
    for key in changes["return_kwargs"]:
        assert torch.equal(*(getattr(result, key) for result in found))
    assert capsys.readouterr().err == ""


def test_what_is_not_ours_goes_to_theirs(flow_factory, capsys) -> None:
    ours, plain = ready(flow_factory.FlowMatchEulerDiscreteSDEScheduler), ready(theirs())
    latents = torch.zeros(SHAPE)
    off = {"timestep": torch.tensor(333.0), "timestep_next": torch.tensor(100.0), "next_latents": latents}
    levels = {"noise_level": torch.tensor([0.7, 0.3, 0.7, 0.1]), "next_latents": latents}
    for changes in (off, levels):
        for _ in range(2):
            found, want = (s.step(**call(s, 2, torch.float32, **changes)) for s in (ours, plain))
            assert torch.equal(found.log_prob, want.log_prob)
    assert [line.partition("step: ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "a call with timesteps that do not follow each other in the schedule goes to Flow-Factory's own",
        "a call with a noise level for each sample goes to Flow-Factory's own",
    ]


def test_the_scheduler_is_theirs_by_name(flow_factory) -> None:
    made = flow_factory.FlowMatchEulerDiscreteSDEScheduler
    assert issubclass(made, theirs()) and pickle.loads(pickle.dumps(made)) is made
    flow_factory.register()
    if "flow_factory.scheduler.registry" in sys.modules:
        find = sys.modules["flow_factory.scheduler"].get_sde_scheduler_class
        assert find(FlowMatchEulerDiscreteScheduler) is made
    else:
        assert type(sys.modules["flow_factory.scheduler"].load("FlowMatchEulerDiscreteScheduler")) is made


@contextlib.contextmanager
def adapter_of(**transformers):
    """A double's configuration and accelerator; adapters that are made inside have these transformers."""
    engines.Flux1Adapter.make = staticmethod(lambda: transformers)
    train = SimpleNamespace(
        height=32, width=32, per_device_batch_size=2, num_batches_per_epoch=2, num_inference_steps=6, guidance_scale=1.0
    )
    model = SimpleNamespace(model_name_or_path="flux-dev", finetune_type="full", lora_rank=4)
    config = SimpleNamespace(training_args=train, model_args=model)
    yield config, SimpleNamespace(device=torch.device("cpu"))


def test_adapter_with_step_and_blocks(small_flow_factory, capsys) -> None:
    model, inputs = TINY["flux"].model(), TINY["flux"].inputs()
    plain = run(model, inputs)
    with adapter_of(transformer=model, transformer_2=torch.nn.Identity()) as given:
        made = small_flow_factory.flux1(*given)
    assert isinstance(made, engines.Flux1Adapter)
    assert type(made.scheduler) is small_flow_factory.FlowMatchEulerDiscreteSDEScheduler
    assert any("forward" in vars(block) for block in model.transformer_blocks)
    assert_same_bits(run(model, inputs), plain)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines][:2] == [
        "flux1: a dancegrpo_fast.plugins.flow_factory.FlowMatchEulerDiscreteSDEScheduler",
        'flux1, transformer: block ops, "lossless", in a FluxTransformer2DModel',
    ]
    assert "flux1, transformer_2: no block ops, transformer: got torch.nn.modules.linear.Identity" in lines[2]
    assert getattr(small_flow_factory, "sd3-5").__name__ == "sd3-5"
    with pytest.raises(AttributeError, match=r"got nothing, want one of .*Step, Blocks, Checkpointing, flux1, sd3-5"):
        _ = small_flow_factory.nothing


def test_accelerators(small_flow_factory, capsys) -> None:
    """After `prepare()`: step, block ops and what is recomputed, in a model with the same bits as before."""
    model, inputs = TINY["flux"].model(), TINY["flux"].inputs()
    plain = run(model, inputs)
    with adapter_of(transformer=torch.nn.DataParallel(model)) as given:
        adapter = engines.Flux1Adapter(*given)
    scheduler = adapter.scheduler
    for name, params in (("Step", {}), ("Blocks", {}), ("Checkpointing", {"policy": "first:3"})):
        accelerator = getattr(small_flow_factory, name)(**params)
        assert isinstance(accelerator, engines.BaseAccelerator)
        assert (accelerator.safety, accelerator.stage) == ("lossless", "both")
        accelerator.setup(adapter)
        with accelerator.rollout_context(adapter):
            pass
    assert adapter.scheduler is scheduler and type(scheduler).__module__ == "dancegrpo_fast.plugins.flow_factory"
    assert_same_bits(run(model, inputs), plain)
    assert model.is_gradient_checkpointing
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "Step: our step in a FlowMatchEulerDiscreteSDEScheduler",
        'Blocks, transformer: block ops, "lossless", in a FluxTransformer2DModel',
        "Checkpointing, transformer: first:3",
    ]
    with pytest.raises(ValueError, match=r"Step: got a .* want one of Flow-Factory's"):
        small_flow_factory.Step().setup(adapter)


@pytest.mark.parametrize(
    ("name", "known"), [("Step", "none"), ("Blocks", "mode"), ("Checkpointing", "policy, offload")]
)
def test_unknown_parameters_are_refused(small_flow_factory, name: str, known: str) -> None:
    with (
        adapter_of(transformer=torch.nn.Identity()) as given,
        pytest.raises(ValueError, match=f"got moed, want {known}"),
    ):
        getattr(small_flow_factory, name)(moed="fast").setup(engines.Flux1Adapter(*given))


def test_blocks_that_cannot_be_put_in_are_an_error(small_flow_factory) -> None:
    with adapter_of(transformer=torch.nn.Identity()) as given:
        adapter = engines.Flux1Adapter(*given)
    with pytest.raises(ValueError, match=r"Blocks: transformer: got .*Identity.*; under FSDP want model_type: "):
        small_flow_factory.Blocks().setup(adapter)


@pytest.mark.release
def test_the_planner_picks_a_policy(small_flow_factory, tmp_path, capsys) -> None:
    folder = save_flux(tmp_path / "flux")
    model = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    with adapter_of(transformer=model) as given:
        given[0].model_args.model_name_or_path = str(folder)
        adapter = engines.Flux1Adapter(*given)
    with pytest.raises(ValueError, match=r'policy: got "auto" on cpu, want memory_gib, or a policy by name'):
        small_flow_factory.Checkpointing().setup(adapter)
    with pytest.raises(ValueError, match=r"want at least \d\.\d\d for the replay"):
        small_flow_factory.Checkpointing(memory_gib=0.1).setup(adapter)
    small_flow_factory.Checkpointing(memory_gib=8.0).setup(adapter)
    assert "Checkpointing, transformer: none: the replay " in capsys.readouterr().err
    assert not model.is_gradient_checkpointing and len(checkpointing.blocks_of(model)) == 2
    adapter.model_args.finetune_type, adapter.target_module_map = "lora", {"transformer": "all"}
    with pytest.raises(ValueError, match='got "auto" with target_modules "all" under LoRA, want the modules by name'):
        small_flow_factory.Checkpointing(memory_gib=8.0).setup(adapter)


def test_without_the_engine() -> None:
    with engines.fresh("flow_factory", "unirl", "verl_omni"):
        plugin = importlib.import_module("dancegrpo_fast.plugins.flow_factory")
        for name in ("Blocks", "FlowMatchEulerDiscreteSDEScheduler"):
            with pytest.raises(ImportError, match=r"got No module named 'flow_factory', want .*Flow-Factory installed"):
                getattr(plugin, name)
        assert not hasattr(plugin, "flux1") and not hasattr(plugin, "__wrapped__")
        with pytest.raises(ImportError, match="No module named 'verl_omni', want verl-omni installed"):
            importlib.import_module("dancegrpo_fast.plugins.verl_omni")
        with pytest.raises(ImportError, match="No module named 'unirl', want UniRL on the path"):
            _ = importlib.import_module("dancegrpo_fast.plugins.unirl").FlowSDEStrategy
