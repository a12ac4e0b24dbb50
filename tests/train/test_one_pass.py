"""One pass has the samples and the metrics of two, and their gradient but for the order of its sums."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.memory import profile
from dancegrpo_fast.memory.planning.passes import held
from dancegrpo_fast.profile import profile_recipe
from dancegrpo_fast.train import Trainer
from dancegrpo_fast.train.calls import probe
from dancegrpo_fast.train.per_sample import PerSample

from ..models import cases, checks, folders
from ..release import release_but
from ..tolerances import REORDERED_SUMS, assert_same_training
from .test_gradients import KL, TWO, Seen, watched
from .tiny import LoraSettings, make_recipe, reward

LORA: dict[str, Any] = {"lora": LoraSettings(rank=2, alpha=4)}
# A middle step is left out, and full calls are rare: group of four in calls of three.
UNEVEN: dict[str, Any] = {"micro_batch": 3, "num_steps": 5, "timestep_fraction": 0.5}
BEST: dict[str, Any] = {"best_of_n": 1, "group_size": 5}
DROPPED: dict[str, Any] = {"rewards": [reward("Refusing", on_error="drop", max_dropped=0.9)], "group_size": 5}
RETAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven": UNEVEN,
    "every sample in its row": UNEVEN | {"rows_are_equal": False},
    "noise of each sample's own": {"shared_noise": False},
    "kl": {"kl_weight": KL["kl_weight"]},
    "kl of adapters": {"kl_weight": KL["kl_weight"]} | LORA,
    "ratio norm": {"ratio_norm": True},
    "best of n": BEST,
    "best of n, in their rows": BEST | UNEVEN | {"rows_are_equal": False},
    "batch": BEST | {"rewards": TWO, "advantages": "batch"},
    "dropped": DROPPED,
    "one group": {"rewards": [reward("FirstGroup")]},
    "no group": {"rewards": [reward("Constant")]},
    "ddim": {"guidance_scale": 4.0},
    "checkpointed": {"checkpointing": "full"},
}
REWEIGHTED = {name: changes | LORA for name, changes in RETAINED.items() if "kl_weight" not in changes}
QUICK = [
    *(("retain", name) for name in ("plain", "every sample in its row", "kl of adapters", "no group")),
    *(("reweight", name) for name in ("dropped", "best of n, in their rows", "ddim")),
]
ALL = [("retain", name) for name in RETAINED] + [("reweight", name) for name in REWEIGHTED]


def trained(recipe: Any) -> Seen:
    """One iteration, of LoRA layers that are not zero."""
    trainer = Trainer(recipe)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return watched(trainer)


def assert_alike(one: Seen, two: Seen) -> None:
    """The same samples, bit by bit, and all but their work and their times alike."""
    for ours, theirs in zip(vars(one.batch.trajectory).values(), vars(two.batch.trajectory).values(), strict=True):
        assert theirs is None if ours is None else torch.equal(ours, theirs)
    assert one.row.keys() == two.row.keys()
    assert one.row.get("log_prob_change") == two.row.get("log_prob_change")
    for name in one.row.keys() - {"seconds", "speed", "skipped", "log_prob_change"}:
        # Near 0 as advantages add up to it.
        near = 1e-6 if name == "policy_loss" else None
        assert one.row[name] == pytest.approx(two.row[name], rel=REORDERED_SUMS, abs=near), name
    (ours,), (theirs,) = one.gradients, two.gradients
    assert torch.linalg.norm(ours - theirs) <= REORDERED_SUMS * torch.linalg.norm(theirs)


@pytest.mark.parametrize("case", release_but(QUICK, ALL), ids="-".join)
def test_the_gradient_is_that_of_two(
    flux: Path, diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[Any, str]
) -> None:
    passes, name = case
    changes = dict((RETAINED if passes == "retain" else REWEIGHTED)[name])
    equal = changes.pop("rows_are_equal", True)
    monkeypatch.setattr("dancegrpo_fast.train.setup.rows_are_equal", lambda *_: equal)
    base = diffusion if name == "ddim" else flux
    one, two = (
        trained(make_recipe(base, tmp_path / str(kind), passes=kind, max_grad_norm=1e9, **changes))
        for kind in (passes, 2)
    )
    assert_alike(one, two)
    ours, theirs = one.row["skipped"], two.row["skipped"]
    assert theirs["one_pass_rows"] == 0 and ours["zero_advantage_skipped"] == theirs["zero_advantage_skipped"]
    # What is replayed is the step that a prompt's samples share.
    replayed = 0 if name in ("noise of each sample's own", "no group") else 1 if name == "one group" else 3
    assert ours["model_rows"] - ours["padded_rows"] <= replayed
    if name == "plain":
        assert ours["one_pass_rows"] + 3 == theirs["model_rows"] - theirs["padded_rows"]


FAMILIES = [
    pytest.param(name, passes, marks=[] if (name, passes) == ("wan_a14b", "reweight") else [pytest.mark.release])
    for name in ("wan", "wan_a14b", "hunyuan_video", "sd3", "qwen_image")
    for passes in ("retain", "reweight")
]


@pytest.mark.parametrize(("name", "passes"), FAMILIES)
def test_families(tmp_path: Path, passes: Any, name: str) -> None:
    """Videos, guided calls, and two denoisers that take turns."""
    base = folders.BUILDERS[name](tmp_path / name / "base")
    changes: dict[str, Any] = {"lora": True, "timestep_fraction": 1.0, "max_grad_norm": 1e9}
    one, two = (
        trained(cases.make_recipe(cases.CASES[name], base, tmp_path / f"{kind}" / "out", passes=kind, **changes))
        for kind in (passes, 2)
    )
    assert_alike(one, two)


def test_under_autocast(flux: Path, tmp_path: Path) -> None:
    """Of bfloat16 products the samples' sums are rounded apart, and added in float32."""
    one, two = (
        trained(make_recipe(flux, tmp_path / str(kind), passes=kind, mixed_precision="bf16", **LORA))
        for kind in ("reweight", 2)
    )
    assert torch.equal(one.batch.trajectory.latents, two.batch.trajectory.latents)
    assert_same_training(one.gradients[0], two.gradients[0])


def test_a_run_goes_on_as_it_was(flux: Path, tmp_path: Path) -> None:
    """Sums begin anew in every iteration; another number of passes is another run."""
    checks.train(flux, tmp_path / "whole", passes="reweight", **LORA)
    checks.train(flux, tmp_path / "again", passes="reweight", **LORA)
    checks.assert_same_weights(tmp_path / "whole", tmp_path / "again")
    parts = checks.small_recipe(flux, tmp_path / "parts", passes="reweight", **LORA, iterations=1)
    Trainer(parts).run()
    longer = replace(parts, train=replace(parts.train, iterations=3))
    two = replace(longer, train=replace(longer.train, passes=2))
    with pytest.raises(ValueError, match=r'train\.passes: got 2, want "reweight"; .* --accept-changes train.passes'):
        Trainer(two, "auto")
    Trainer(longer, "auto").run()
    checks.assert_same_weights(tmp_path / "whole", tmp_path / "parts")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "updates": ({"updates_per_rollout": 2}, 'got "retain" with updates_per_rollout 2, want 2'),
    "epochs": ({"inner_epochs": 2}, 'got "retain" with inner_epochs 2, want 2'),
    "split samples": ({"sequence_parallel": 2}, 'got "retain" with sequence_parallel 2, want 2'),
    "reductions": ({"gradient_sync": "call"}, 'got "retain" with gradient_sync "call", want "update"'),
    "weights": ({"passes": "reweight"}, 'got "reweight" without model.lora, want LoRA layers'),
    "kl": ({"passes": "reweight", "kl_weight": 0.1} | LORA, 'got "reweight" with kl_weight 0.1, whose gradient'),
    "float16": ({"dtype": "float16"} | LORA, 'got "retain" with model.dtype float16'),
    "auto": ({"checkpointing": "auto"}, 'got "retain" with model.checkpointing "auto", which has room for one graph'),
    "auto sums": (
        {"passes": "reweight", "checkpointing": "auto"} | LORA,
        'got "reweight" with model.checkpointing "auto"',
    ),
    "block ops": ({"passes": "reweight", "block_ops": "fast"} | LORA, 'got "reweight" with model.block_ops "fast"'),
    "compiled": ({"compile": "blocks"} | LORA, 'got "retain" with model.compile "blocks", want 2'),
    "swap": ({"blocks_to_swap": 1} | LORA, 'got "retain" with model.blocks_to_swap 1, want 2'),
    "denoiser": ({"offload": ["denoiser"]}, 'got "retain" with train.offload "denoiser"'),
    "another": ({"passes": 3}, 'got 3, want 2 or 1 or "retain" or "reweight"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_have_is_refused(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match="^" + re.escape(f"train.passes: {message}")):
        make_recipe(tmp_path, tmp_path / "run", **{"passes": "retain"} | changes)


def test_a_model_whose_samples_cannot_be_told_apart_is_refused(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_recipe(flux, tmp_path / "run", **LORA))
    conditioning = trainer.model.encode(trainer.prompts[:4])
    inputs = probe(trainer.policy, trainer.table, conditioning)
    sums, predict = PerSample(trainer.model.denoiser, trainer.parameters, 4), trainer.model.predict
    weight = next(iter(trainer.parameters.values()))

    def mixed(*arguments: Any) -> Any:
        output, uncond = predict(*arguments)
        return output + output.roll(1, dims=0), uncond

    def passed_by(*arguments: Any) -> Any:
        output, uncond = predict(*arguments)
        return output + weight.sum(), uncond

    sums.check(trainer.policy, inputs)
    for wrong, message in ((mixed, "mixes the rows"), (passed_by, "does not call the module of .*lora_A")):
        monkeypatch.setattr(trainer.model, "predict", wrong)
        with pytest.raises(ValueError, match=f'got "reweight".* {message}'):
            sums.check(trainer.policy, inputs)
    monkeypatch.setattr(trainer.model, "predict", predict)
    sums.rows = 3
    with pytest.raises(ValueError, match="a layer that sees 4 rows in a call of 3"):
        sums.check(trainer.policy, inputs)
    with pytest.raises(ValueError, match="extra is no linear LoRA layer's"):
        PerSample(trainer.model.denoiser, {"extra": torch.nn.Parameter(torch.zeros(1))}, 4)


@pytest.mark.release
def test_a_profile_says_what_it_does_not_predict(flux: Path, tmp_path: Path) -> None:
    report = profile_recipe(make_recipe(flux, tmp_path / "run", passes="retain"), iterations=1)
    assert report.predicted == {} and "not predicted: one pass on a CPU" in report.notes
    assert report.rows["rollout"].budget["saved"] > 0


@pytest.mark.release
def test_graphs_take_what_is_planned(flux: Path, tmp_path: Path) -> None:
    """What each more of the rollout's calls keeps, on tensors that exist: the planner counts the model's."""
    options: dict[str, Any] = {"mixed_precision": "bf16", "shared_noise": False, "passes": "retain"}
    calls, saved = [], []
    for fraction in (1.0, 0.4):
        trainer = Trainer(make_recipe(flux, tmp_path / str(fraction), timestep_fraction=fraction, **options))
        with profile() as report:
            trainer.collect(1, trainer.prompts)
        assert trainer.updates.one_pass is not None
        calls.append(len(trainer.updates.one_pass._records))
        saved.append(report.peak.budget["saved"])
    more = (saved[0] - saved[1]) / (calls[0] - calls[1])
    model: Any = trainer.model
    iteration = checks.pieces(trainer.recipe, model)
    planned = held(iteration, iteration.pick().blocks, "retain")["saved"] / (iteration.training_calls - 1)
    latents, times, text, _ = probe(trainer.policy, trainer.table, trainer.model.encode(trainer.prompts[:1]))
    # The rollout's own: inputs, and outputs of the inputs' size.
    own = 2 * latents.nbytes + times.nbytes + sum(value.nbytes for value in text.values())
    assert calls[0] > calls[1] and 0 <= more - planned <= own
