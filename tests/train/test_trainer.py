"""The loop in both paradigms: exact ratio, options, shared work, and what stops a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.prompts import prompts_of_iteration
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train.draw import Draw, Start
from dancegrpo_fast.train.loop import Trainer
from dancegrpo_fast.train.losses import grpo
from dancegrpo_fast.train.metrics import Tally, metrics_row

from ..release import release_but
from .tiny import LoraSettings, make_recipe, reward


def train(base: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    Trainer(make_recipe(base, output, **changes)).run()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.complete(output / "checkpoints")[-1])[0]["model"]


@pytest.mark.pairs
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("micro_batch", [1, 3, 12])
def test_first_update_has_ratio_one(base: Path, tmp_path: Path, micro_batch: int, shared: bool) -> None:
    rows = train(base, tmp_path / "run", micro_batch=micro_batch, shared_noise=shared, updates_per_rollout=3)
    for row in rows:
        assert row["ratio_first_update_max_dev"] == 0.0
        assert row["ratio_max_dev"] > 0.0
        assert row["grad_norm"] > 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "flow_sde"},
        {"kind": "cps", "eta": 0.7},
        {"window": [1, 2], "timestep_fraction": 1.0},
        {"latents_dtype": "bfloat16"},
        {"dtype": "bfloat16", "master_dtype": "float32"},
        {"mixed_precision": "bf16"},
        {"ratio_norm": True},
        {"checkpointing": "full"},
        {"lora": LoraSettings(rank=2, alpha=4)},
        {"block_ops": "fast", "mixed_precision": "bf16"},
        {"block_ops": "lossless", "lora": LoraSettings(rank=2, alpha=4), "checkpointing": "full"},
    ],
    ids=lambda c: next(iter(c)) + "-" + str(next(iter(c.values())))[:9],
)
def test_ratio_one_for_flows(flux: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    for row in train(flux, tmp_path / "run", **changes):
        assert row["ratio_first_update_max_dev"] == 0.0
        assert row["grad_norm"] > 0.0


def test_lossless_block_ops_train_to_the_same_bits(flux: Path, tmp_path: Path) -> None:
    for name in ("off", "lossless"):
        train(flux, tmp_path / name, block_ops=name)
    plain, ours = (weights(tmp_path / name) for name in ("off", "lossless"))
    assert all(torch.equal(ours[key], value) for key, value in plain.items())


def test_block_ops_for_another_denoiser_are_refused(diffusion: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'model.block_ops: got "fast", transformer: got .*UNet2DConditionModel, want'):
        train(diffusion, tmp_path / "run", block_ops="fast")


@pytest.mark.parametrize(
    "changes",
    release_but(
        ({"guidance_scale": 4.0, "latents_dtype": "bfloat16"}, {"kind": "vp_sde"}),
        [
            {"guidance_scale": 4.0},
            {"kind": "vp_sde"},
            {"guidance_scale": 4.0, "latents_dtype": "bfloat16"},
            {"eta": 1.0},
        ],
    ),
    ids=str,
)
def test_ratio_one_for_diffusion(diffusion: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    for row in train(diffusion, tmp_path / "run", **changes):
        assert row["ratio_first_update_max_dev"] == 0.0
        assert row["grad_norm"] > 0.0


def test_shared_first_step_changes_nothing_but_the_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one row a call, sharing changes neither the shape nor the bits of any call.
    options: dict[str, Any] = {"micro_batch": 1, "iterations": 1, "timestep_fraction": 1.0}
    shared = train(base, tmp_path / "shared", **options)[0]
    samples = Draw.samples

    def separate_samples(draw: Draw, start: Start, prompts: torch.Tensor, ids: torch.Tensor, *_: Any) -> Any:
        return samples(draw, start.shared.latents[prompts, 0], prompts, ids)

    monkeypatch.setattr(Draw, "samples", separate_samples)
    trainer = Trainer(make_recipe(base, tmp_path / "separate", **options))
    plan = trainer.updates.plan
    monkeypatch.setattr(trainer.updates, "plan", lambda batch, *rest: plan(replace(batch, shared_step=None), *rest))
    separate = trainer.iteration(1)
    # Three prompts, of whose four samples three need no first step of their own.
    assert shared["skipped"]["shared_rows_saved"] == 9
    assert separate["skipped"]["model_rows"] == shared["skipped"]["model_rows"] + 9
    for name in ("reward/Brightness", "ratio_first_update_max_dev"):
        assert shared[name] == separate[name]
    assert shared["grad_norm"] == pytest.approx(separate["grad_norm"], rel=torch.finfo(torch.float32).eps ** 0.5)


def test_equal_rewards_are_not_replayed(base: Path, tmp_path: Path) -> None:
    row = train(base, tmp_path / "run", iterations=1, rewards=[reward("Constant")])[0]
    assert row["zero_std_groups"] == 3
    assert row["skipped"]["model_rows"] == 0
    assert row["skipped"]["zero_advantage_skipped"] == 12 * 2
    assert row["grad_norm"] == 0.0


def test_equal_rewards_are_replayed_under_kl(base: Path, tmp_path: Path) -> None:
    rows = train(base, tmp_path / "run", rewards=[reward("Constant")], kl_weight=0.1)
    assert all(row["skipped"]["model_rows"] > 0 for row in rows)
    assert rows[0]["reference_kl"] == 0.0


def test_skipping_zero_advantages_keeps_the_gradient(flux: Path, tmp_path: Path) -> None:
    rewards = [reward("Brightness", threshold=0.5)]
    plain = train(flux, tmp_path / "plain", iterations=1, rewards=rewards, micro_batch=1)[0]
    # A vanishing KL forbids the skip and adds nothing that float32 could show.
    pulled = train(flux, tmp_path / "pulled", iterations=1, rewards=rewards, micro_batch=1, kl_weight=1e-30)[0]
    assert plain["skipped"]["zero_advantage_skipped"] > 0
    assert pulled["skipped"]["zero_advantage_skipped"] == 0
    assert plain["grad_norm"] == pulled["grad_norm"]


@pytest.mark.pairs
@pytest.mark.parametrize("precision", release_but(("no",), ["no", "bf16"]))
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=2)], ids=["full", "lora"])
def test_kl_starts_at_zero_and_leaves_it(base: Path, tmp_path: Path, lora: LoraSettings | None, precision: str) -> None:
    options: dict[str, Any] = {"iterations": 3, "kl_weight": 0.01, "learning_rate": 1e-2}
    rows = train(base, tmp_path / "run", lora=lora, mixed_precision=precision, **options)
    assert rows[0]["reference_kl"] == 0.0
    assert rows[1]["reference_kl"] > 0.0 and rows[2]["reference_kl"] > 0.0


def test_best_of_n_trains_on_the_ends(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_recipe(base, tmp_path / "run", iterations=1, best_of_n=1))
    batch = trainer.collect(1, trainer.prompts)
    monkeypatch.setattr(trainer, "collect", lambda *_: batch)
    row = trainer.iteration(1)
    groups = batch.advantages.reshape(3, 4)
    ends = torch.stack([groups.argmax(dim=1), groups.argmin(dim=1)], dim=1) + 4 * torch.arange(3)[:, None]
    assert batch.chosen == batch.kept == sorted(ends.flatten().tolist())
    assert batch.own_advantages.tolist() == batch.advantages[batch.kept].tolist()
    assert len(batch.trajectory.latents) == 6
    assert row["pairs"] == 3 * 2 * 2
    assert row["ratio_first_update_max_dev"] == 0.0


def test_several_rewards_sum_their_advantages(flux: Path, tmp_path: Path) -> None:
    both = [reward("Brightness"), reward("Constant", weight=3.0)]
    one = train(flux, tmp_path / "one", iterations=1)[0]
    two = train(flux, tmp_path / "two", iterations=1, rewards=both)[0]
    # The constant reward's advantages are zero, so it must not change the update.
    assert one["grad_norm"] == two["grad_norm"]
    assert two["reward/Constant"] == 0.5


def test_threshold_makes_rewards_binary(flux: Path, tmp_path: Path) -> None:
    row = train(flux, tmp_path / "run", iterations=1, rewards=[reward("Brightness", threshold=0.5)])[0]
    assert row["reward/Brightness>0.5"] * 12 == pytest.approx(round(row["reward/Brightness>0.5"] * 12))


def test_groups_that_differ_by_rounding_are_left_out(flux: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_recipe(flux, tmp_path / "run", rewards=[reward("Steady")]))
    seen = trainer.collect(1, prompts_of_iteration(trainer.prompts, 3, 0, seed=0))
    row, groups = trainer.iteration(1), seen.rewards.reshape(3, 4)
    assert bool((groups.std(dim=1) > 0).all()) and not seen.advantages[4:].any() and bool(seen.advantages[:4].all())
    assert (row["zero_std_groups"], row["pairs"], row["skipped"]["zero_advantage_skipped"]) == (2, 4 * 2, 8 * 2)
    assert row["reward_group_std/Steady"] == pytest.approx(float(groups.double().std(dim=1).mean()))
    assert row["reward_group_std/Steady"] < row["reward_std/Steady"]


def test_each_reward_is_limited_alone(flux: Path, tmp_path: Path) -> None:
    """Not their sum, which the loss would see otherwise."""
    both = [reward("Brightness", weight=3.0), reward("Brightness", weight=3.0, label="again")]
    row = train(flux, tmp_path / "run", iterations=1, rewards=both, advantage_clip=1.0)[0]
    assert 0 < row["advantage_clip_fraction"] < 1
    assert row["advantage_max"] == 6.0


def test_a_first_update_without_samples_is_not_called_exact(flux: Path, tmp_path: Path) -> None:
    # One sample an update; with a binary reward some updates have none to train on.
    recipe = make_recipe(
        flux, tmp_path / "run", iterations=4, updates_per_rollout=12, rewards=[reward("Brightness", threshold=0.5)]
    )
    trainer = Trainer(recipe)
    rows = [trainer.iteration(iteration) for iteration in range(1, 5)]
    for row in rows:
        if row["skipped"]["zero_advantage_skipped"] == 0:
            assert row["ratio_first_update_max_dev"] == 0.0
    tally = Tally(trainer.loss.metrics, len(trainer.table), grad_norms=[torch.zeros(())])
    quiet = metrics_row(1, ["Brightness"], recipe.train, trainer.collect(1, trainer.prompts), tally, trainer.processes)
    assert "ratio_first_update_max_dev" not in quiet


def test_a_ratio_off_one_is_warned_about(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_recipe(flux, tmp_path / "run"))
    samples = Draw.samples

    def shifted(*arguments: Any) -> Any:
        trajectory = samples(*arguments)
        trajectory.log_probs.add_(1e-3)
        return trajectory

    monkeypatch.setattr(Draw, "samples", shifted)
    with pytest.warns(UserWarning, match="away from 1"):
        row = trainer.iteration(1)
    assert row["ratio_first_update_max_dev"] > 0


def test_clipped_calls_need_no_backward(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Next to no range clips about half of the samples as soon as the policy moves; one row a call shows each of them.
    options: dict[str, Any] = {"micro_batch": 1, "inner_epochs": 2, "clip_range": 1e-12, "iterations": 1}
    row = train(flux, tmp_path / "skipped", **options)[0]
    assert row["skipped"]["backwards_skipped"] > 0
    loss = grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *a, **k: loss(*a, **k)._replace(has_grad=torch.ones(1)))
    every = train(flux, tmp_path / "every", **options)[0]
    assert every["skipped"]["backwards_skipped"] == 0
    for name in ("grad_norm", "policy_loss", "clip_fraction"):
        assert row[name] == every[name]


def test_each_side_of_the_clip_has_a_range_of_its_own(flux: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"inner_epochs": 2, "iterations": 1}
    none, all_of_it = 1e3, 1e-12
    ranges = {"below": (all_of_it, none), "above": (none, all_of_it), "both": (all_of_it, all_of_it), "one": all_of_it}
    found = {
        name: train(flux, tmp_path / name, clip_range=clip_range, **options)[0]["clip_fraction"]
        for name, clip_range in ranges.items()
    }
    assert found["below"] > 0 and found["above"] > 0 and found["one"] == found["both"]
    assert found["below"] + found["above"] == pytest.approx(found["both"])


def test_inner_epochs_and_updates_step_the_optimiser(flux: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_recipe(flux, tmp_path / "run", updates_per_rollout=3, inner_epochs=2))
    trainer.iteration(1)
    steps = {int(state["step"]) for state in trainer.optimizer.torch.state.values()}
    assert steps == {6}


def test_reward_rises(flux: Path, tmp_path: Path) -> None:
    rows = train(flux, tmp_path / "run", iterations=12, learning_rate=3e-3, group_size=8, micro_batch=24)
    first = sum(row["reward/Brightness"] for row in rows[:3])
    last = sum(row["reward/Brightness"] for row in rows[-3:])
    assert last > first


@pytest.mark.parametrize("how", ["raises", "nan", "shape", "integers", "list"])
def test_a_bad_reward_stops_the_run_and_keeps_it(flux: Path, tmp_path: Path, how: str) -> None:
    output = tmp_path / "run"
    train(flux, output, iterations=1)
    before = weights(output)
    broken = make_recipe(flux, output, rewards=[reward("Broken", args={"how": how})])
    broken.output_dir = str(tmp_path / "broken")
    with pytest.raises(RuntimeError, match="Broken"):
        Trainer(broken).run()
    assert not (tmp_path / "broken" / "metrics.jsonl").exists()
    assert all(torch.equal(before[name], value) for name, value in weights(output).items())


def test_a_used_directory_is_refused(flux: Path, tmp_path: Path) -> None:
    train(flux, tmp_path / "run", iterations=1)
    with pytest.raises(ValueError, match=r"output_dir.*--resume auto"):
        Trainer(make_recipe(flux, tmp_path / "run"))


def test_no_stochastic_step_is_refused(flux: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'sampler\.kind: got "ode", want one with noise'):
        Trainer(make_recipe(flux, tmp_path / "run", kind="ode"))
    with pytest.raises(ValueError, match=r"sampler\.kind.*ddim"):
        Trainer(make_recipe(flux, tmp_path / "run", kind="ddim"))
    with pytest.raises(ValueError, match=r"height 18"):
        Trainer(make_recipe(flux, tmp_path / "run", height=18))
    with pytest.raises(ValueError, match="guidance_scale"):
        Trainer(make_recipe(flux, tmp_path / "run", guidance_scale=3.0))
    with pytest.raises(ValueError, match="target_modules"):
        Trainer(make_recipe(flux, tmp_path / "run", lora=LoraSettings(target_modules=["nothing"])))


def test_saved_model_reloads(base: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    train(base, tmp_path / "run", iterations=1)
    kind, name = (
        (FluxTransformer2DModel, "transformer")
        if base.parent.name.startswith("flux")
        else (UNet2DConditionModel, "unet")
    )
    loaded = kind.from_pretrained(tmp_path / "run" / "model", subfolder=name)
    trained = weights(tmp_path / "run")
    assert all(torch.equal(value, trained[key]) for key, value in loaded.state_dict().items())


def test_saved_lora_reloads_with_its_alpha(flux: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    trainer = Trainer(make_recipe(flux, tmp_path / "run", iterations=1, lora=LoraSettings(rank=2, alpha=6)))
    trainer.run()
    denoiser = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer")
    state, alphas, metadata = FluxPipeline.lora_state_dict(
        tmp_path / "run" / "model", return_alphas=True, return_lora_metadata=True
    )
    FluxPipeline.load_lora_into_transformer(state, alphas, denoiser, metadata=metadata)
    config = denoiser.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (2, 6)
    trained = trainer.accelerator.unwrap_model(trainer.denoiser)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "timestep": torch.tensor([0.5]),
        "pooled_projections": torch.randn(1, 16),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "txt_ids": torch.zeros(3, 3),
        "img_ids": torch.zeros(16, 3),
        "return_dict": False,
    }
    with torch.no_grad():
        assert torch.equal(denoiser.eval()(**inputs)[0], trained.eval()(**inputs)[0])
