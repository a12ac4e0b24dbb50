"""Wan of two transformers: who is trained, where weights wait, what is saved and started from, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dancegrpo_fast.evaluate.weights import load_weights
from dancegrpo_fast.experts import Experts, each
from dancegrpo_fast.memory.planning.settings import Settings
from dancegrpo_fast.models import load_model
from dancegrpo_fast.models.planning import settings_of
from dancegrpo_fast.profile.profiler import profile_recipe
from dancegrpo_fast.recipe import Recipe
from dancegrpo_fast.train.loop import Trainer

from ..release import release_but
from . import checks
from .cases import CASES, load, make_recipe
from .folders import diffusers, save_wan_a14b
from .test_quantization import without_gpu as without_gpu

Base = Callable[[str], Path]
CASE = CASES["wan_a14b"]


def recipe_of(base: Base, output: Path, **changes: Any) -> Recipe:
    return make_recipe(CASE, base("wan_a14b"), output, **changes)


def parts(values: dict[str, Tensor]) -> set[str]:
    return {name.partition(".")[0] for name in values}


def test_the_second_takes_the_steps_below_the_boundary(base: Base, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path / "run", num_steps=6, shift=3.0)
    model, _ = load(recipe)
    times = model.table(recipe.sampler).times
    assert (
        model.turns(model.table(recipe.sampler)) == [int(time < 0.875) for time in times.tolist()] == [0, 0, 1, 1, 1, 1]
    )


@pytest.mark.parametrize("lora", release_but([False], [False, True]), ids=["full", "lora"])
def test_frozen_is_the_second_as_loaded(base: Base, tmp_path: Path, lora: bool) -> None:
    """And nothing is trained on its steps."""
    recipe = recipe_of(base, tmp_path / "run", lora=lora, second_expert="frozen", iterations=1, timestep_fraction=1.0)
    trainer = Trainer(recipe)
    second = {name: value.clone() for name, value in each(trainer.model.denoiser)[1].state_dict().items()}
    assert trainer.loss.pairs_per_sample == 1 and parts(dict(trainer.parameters)) == {"transformer"}
    trainer.run()
    found = each(trainer.model.denoiser)[1].state_dict()
    assert found.keys() == second.keys() and all(torch.equal(value, found[name]) for name, value in second.items())
    assert not any("lora" in name for name in found)
    saved = sorted(
        file.relative_to(tmp_path / "run" / "model").parts[0]
        for file in (tmp_path / "run").rglob("*.safetensors")
        if "model" in file.parts
    )
    assert saved == (["pytorch_lora_weights.safetensors"] if lora else ["transformer"])


def test_both_are_stepped_in_every_update(base: Base, tmp_path: Path) -> None:
    """Of one sample and one step each, so that one of the two has no call."""
    trainer = Trainer(
        recipe_of(
            base,
            tmp_path / "run",
            lora=True,
            iterations=1,
            updates_per_rollout=6,
            micro_batch=1,
            kl_weight=0.1,
            ema_decay=0.5,
        )
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    trainer.run()
    assert {int(state["step"]) for state in trainer.optimizer.torch.state.values()} == {6}
    moved = {name: value for name, value in trainer.parameters.items() if not torch.equal(value, before[name])}
    assert parts(dict(trainer.parameters)) == parts(moved) == {"transformer", "transformer_2"}


class Layer(nn.Module):
    """A frozen weight, a trained one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.frozen * self.trained * self.table


def test_one_experts_frozen_weights_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts({"transformer": Layer(), "transformer_2": Layer()}, frozen=False)
    places: dict[str, str] = {}
    names = {id(parameter): name for name, parameter in experts.named_parameters()}

    def move(parameter: nn.Parameter, device: torch.device) -> None:
        places[names[id(parameter)]] = device.type
        assert list(places.values()).count("meta") <= 1

    monkeypatch.setattr("dancegrpo_fast.experts._move", move)
    monkeypatch.setattr(Experts, "to", lambda *_: None)
    experts.take_turns(torch.device("meta"))
    assert places == {"transformer.frozen": "meta", "transformer_2.frozen": "cpu"}
    for expert in (1, 1, 0, 1):
        places.clear()
        experts(expert=expert, x=torch.ones(2))
        here, waits = ("transformer", "transformer_2")[:: -1 if expert else 1]
        assert places in ({}, {f"{here}.frozen": "meta", f"{waits}.frozen": "cpu"})
    assert experts._running == 1
    # What moves the whole leaves what waits where it is.
    experts._apply(torch.Tensor.double)
    narrow = {name for name, value in experts.state_dict().items() if value.dtype == torch.float32}
    assert narrow == {"transformer.frozen"} and experts.transformer.frozen in set(experts.parameters())


@pytest.mark.release
def test_what_waits_streams_and_is_recomputed_changes_no_bit(base: Base, tmp_path: Path) -> None:
    settings = {"lora": True, "dtype": "bfloat16", "kl_weight": 0.1, "ema_decay": 0.5}
    checks.run(recipe_of(base, tmp_path / "plain", **settings))
    more = {"checkpointing": "full", "offload": ["expert", "denoiser", "vae", "block_inputs"]}
    checks.run(recipe_of(base, tmp_path / "offloaded", **settings, **more))
    checks.assert_same_weights(tmp_path / "plain", tmp_path / "offloaded")


@pytest.mark.release
def test_blocks_of_both_stream(tmp_path: Path) -> None:
    folder = save_wan_a14b(tmp_path / "base", layers=4)
    for name, count in (("plain", 0), ("swapped", 1)):
        checks.run(make_recipe(CASE, folder, tmp_path / name, lora=True, dtype="bfloat16", blocks_to_swap=count))
    checks.assert_same_weights(tmp_path / "plain", tmp_path / "swapped")


@pytest.mark.release
def test_a_profile_has_both(base: Base, tmp_path: Path) -> None:
    """Predicted of a trainer whose calls name a denoiser, in a trace of fake tensors."""
    found = profile_recipe(recipe_of(base, tmp_path / "run", lora=True, dtype="bfloat16"))
    weights = sum(
        p.nbytes for p in load(recipe_of(base, tmp_path / "run", lora=True, dtype="bfloat16"))[0].denoiser.parameters()
    )
    assert found.predicted["rollout"]["parameters"] == found.rows["rollout"].budget["parameters"] >= weights


@pytest.mark.release
@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_both_are_quantised(base: Base, tmp_path: Path, kind: str) -> None:
    more = {"quantization": kind, "dtype": "bfloat16", "checkpointing": "full", "iterations": 1}
    recipe = recipe_of(base, tmp_path / "run", lora=True, **more)
    checks.run(recipe)
    stored = {"nf4": torch.uint8, "fp8": torch.float8_e4m3fn}[kind]
    for one in each(load(recipe)[0].denoiser):
        assert any(parameter.dtype == stored for parameter in one.parameters())


def test_a_run_starts_from_what_another_left(base: Base, tmp_path: Path) -> None:
    """LoRA files, a checkpoint; both for an evaluation, too, and merged as the pipeline merges them."""
    scales = {"guidance_scale_2": 3.0, "micro_batch": 1}
    checks.run(recipe_of(base, tmp_path / "run", lora=True, iterations=1, **scales))
    trained = checks.weights(tmp_path / "run")
    assert parts(trained) == {"transformer", "transformer_2"}

    def is_there(model: Any) -> bool:
        own = dict(model.denoiser.named_parameters())
        return all(torch.equal(own[name], value) for name, value in trained.items())

    changes = {
        "lora": True,
        "start_from": str(tmp_path / "run" / "model"),
        "kl_weight": 0.1,
        "ratio_norm": True,
        "iterations": 1,
        "guidance_scale_2": 3.0,
    }
    checks.run(recipe_of(base, tmp_path / "next", **changes))
    for source in (tmp_path / "run" / "model", tmp_path / "run"):
        assert is_there(load(recipe_of(base, tmp_path / "loaded", **changes | {"start_from": str(source)}))[0])
        model, _ = load(recipe_of(base, tmp_path / "evaluated", lora=True))
        load_weights(model, source)
        assert is_there(model)
    merged, _ = load(recipe_of(base, tmp_path / "merged", start_from=str(source), start_as="merged"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base("wan_a14b"))
    pipeline.load_lora_weights(tmp_path / "run" / "model", adapter_name="default")
    second = {"load_into_transformer_2": True, "adapter_name": "default"}
    pipeline.load_lora_weights(tmp_path / "run" / "model" / "transformer_2", **second)
    loaded = {
        f"{part}.{n}": value for part in parts(trained) for n, value in getattr(pipeline, part).named_parameters()
    }
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    pipeline.fuse_lora(components=["transformer", "transformer_2"])
    for one, name in zip(each(merged.denoiser), ("transformer", "transformer_2"), strict=True):
        theirs = getattr(pipeline, name)
        theirs.unload_lora()
        wanted = theirs.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in one.state_dict().items())
    frozen = {"lora": True, "second_expert": "frozen", "start_from": str(source)}
    with pytest.raises(ValueError, match=r'model.second_expert: got "frozen" with LoRA layers for transformer_2 in '):
        load(recipe_of(base, tmp_path / "frozen", **frozen))
    lost = tmp_path / "run" / "model" / "transformer_2" / "pytorch_lora_weights.safetensors"
    lost.unlink()
    with pytest.raises(ValueError, match=rf"got nothing in {lost}, want what is for transformer_2 there"):
        load(recipe_of(base, tmp_path / "lost", lora=True, start_from=str(lost.parents[1])))


def test_a_whole_run_is_evaluated(base: Base, tmp_path: Path) -> None:
    checks.run(recipe_of(base, tmp_path / "run", iterations=1))
    trained = checks.weights(tmp_path / "run")
    for source in (tmp_path / "run" / "model", tmp_path / "run"):
        model, _ = load(recipe_of(base, tmp_path / "evaluated"))
        load_weights(model, source)
        own = model.denoiser.state_dict()
        assert parts(trained) == {"transformer", "transformer_2"}
        assert all(torch.equal(own[name], value) for name, value in trained.items())


WAN, TWO = r".*, which has one denoiser", r".*, which has two denoisers"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("wan", {"second_expert": "trained"}, rf'model.second_expert: got "trained" for {WAN}, want null'),
        ("wan", {"offload": ["expert"], "lora": True}, rf'train.offload: got "expert" for {WAN}, want it left out'),
        ("wan", {"guidance_scale_2": 2.0}, rf"sampler.guidance_scale_2: got 2.0 for {WAN}, want null"),
        ("wan_a14b", {"denoiser": "elsewhere"}, rf"model.denoiser: got elsewhere for {TWO}, want null"),
        ("wan_a14b", {"sequence_parallel": 2}, rf"train.sequence_parallel: got 2 for {TWO}, want 1"),
        ("wan_a14b", {"start_from": "base"}, r"model.start_from: got a whole denoiser in .* for a model of two"),
    ],
)
def test_what_cannot_be(base: Base, tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    if "start_from" in changes:
        changes = changes | {"start_from": str(base(family))}
    recipe = make_recipe(CASES[family], base(family), tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        load_model(recipe, torch.device("cpu"), [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora": False},
            r'train.offload: got "expert" with all weights trained \(model.lora null\), want one of them',
        ),
        ({"quantization": "nf4"}, r'train.offload: got "expert" with model.quantization "nf4"'),
        ({"blocks_to_swap": 1}, r'train.offload: got "expert" with model.blocks_to_swap 1'),
    ],
)
def test_weights_that_wait_are_whole_and_stay(
    base: Base, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"lora": True, "offload": ["expert"], "dtype": "bfloat16"} | changes
    with pytest.raises(ValueError, match=message):
        recipe_of(base, tmp_path / "run", **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"window": [0]},
            r'got 3 steps at 1, .*, of which .* are above the .*; want .*, or model.second_expert "frozen"$',
        ),
        ({"window": [1]}, r"got 3 steps at 1, .*, of which all with noise before the last are below the .*or window$"),
    ],
)
def test_each_has_a_step_to_train_on(base: Base, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sampler.num_steps: {message}"):
        Trainer(recipe_of(base, tmp_path / "run", timestep_fraction=1.0, **changes))


def test_a_plan_is_the_command_lines(base: Base, tmp_path: Path) -> None:
    settings = {"lora": True, "dtype": "bfloat16", "second_expert": "frozen", "offload": ["expert"]}
    found = settings_of(recipe_of(base, tmp_path / "run", **settings))
    assert (found.second_expert, found.offload) == ("frozen", ("expert",))
    assert settings_of(recipe_of(base, tmp_path / "run")).second_expert == Settings("flux").second_expert == "trained"
