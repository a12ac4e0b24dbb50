"""A base in float16: the gradients that reach its LoRA layers, the scale of the loss, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.prompts import prompts_of_iteration
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train import Trainer, optimizer
from dancegrpo_fast.train.metrics import Tally

from .tiny import LoraSettings, make_recipe, reward

SMALL: dict[str, Any] = {"prompts_per_iteration": 1, "group_size": 3, "micro_batch": 3, "num_steps": 3}
LORA: dict[str, Any] = {"lora": LoraSettings(rank=2, alpha=4), "guidance_scale": 4.0, "clip_range": 0.2}

HUGE = 2.0**20


def first_gradient(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of the first update of an iteration, as the optimiser takes it but for its clipping."""
    found: list[Tensor] = []
    weights, step = trainer.optimizer.weights, trainer.optimizer.torch.step

    def keep() -> None:
        found.append(torch.cat([weight.grad.flatten() for weight in weights.values() if weight.grad is not None]))
        step()

    monkeypatch.setattr(trainer.optimizer.torch, "step", keep)
    row = trainer.iteration(1)
    assert row["ratio_first_update_max_dev"] == 0.0
    if trainer.recipe.model.dtype == "float16":
        assert row["loss_scale"] == optimizer.LOSS_SCALE
    return found[0] * max(1.0, row["grad_norm"] / trainer.recipe.train.max_grad_norm)


def test_gradients_are_no_further_from_float32_than_bfloat16s(
    diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advantages are so small that without the scale all gradients would be 0."""
    options: dict[str, Any] = {"rewards": [reward("Brightness", weight=1e-6)], "iterations": 1, **SMALL, **LORA}
    found = {}
    for name in ("float32", "bfloat16", "float16", "not scaled"):
        if name == "not scaled":
            monkeypatch.setattr(optimizer, "LOSS_SCALE", 1.0)
        dtype = "float16" if name == "not scaled" else name
        trainer = Trainer(make_recipe(diffusion, tmp_path / name, dtype=dtype, **options))
        assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
        found[name] = first_gradient(trainer, monkeypatch)
    off = {name: float((one - found["float32"]).norm() / found["float32"].norm()) for name, one in found.items()}
    assert 0.0 < off["float16"] <= off["bfloat16"] < off["not scaled"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


MASTERS = pytest.param({"master_dtype": "float32", "clip_range": 0.2}, marks=pytest.mark.release)


@pytest.mark.parametrize("changes", [LORA, MASTERS], ids=["lora", "masters"])
def test_gradients_that_overflow_are_made_again(
    diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """As if they had been made with the scale that is found, which a resumed run starts with; nothing counts twice."""
    options: dict[str, Any] = {"dtype": "float16", "updates_per_rollout": 2, "ema_decay": 0.5, **SMALL, **changes}
    monkeypatch.setattr(optimizer, "LOSS_SCALE", HUGE)
    Trainer(make_recipe(diffusion, tmp_path / "halved", **options)).run()
    halved = rows(tmp_path / "halved")
    scale = halved[0]["loss_scale"]
    assert 1 < scale < HUGE
    Trainer(make_recipe(diffusion, tmp_path / "cut", iterations=1, **options)).run()
    monkeypatch.setattr(optimizer, "LOSS_SCALE", scale)
    Trainer(make_recipe(diffusion, tmp_path / "found", **options)).run()
    monkeypatch.setattr(optimizer, "LOSS_SCALE", 2.0)
    Trainer(make_recipe(diffusion, tmp_path / "cut", **options), "auto").run()
    whole = checkpoint.load(tmp_path / "halved" / "checkpoints" / "000002")[0]
    for name in ("found", "cut"):
        for one, other in zip(rows(tmp_path / name), halved, strict=True):
            assert {**one, "seconds": 0, "speed": 0} == {**other, "seconds": 0, "speed": 0}
        groups = checkpoint.load(tmp_path / name / "checkpoints" / "000002")[0]
        for group in ("model", "optimizer", "ema"):
            assert groups[group].keys() == whole[group].keys()
            assert all(torch.equal(value, whole[group][key]) for key, value in groups[group].items())


def test_a_step_is_that_of_torchs_scaler(diffusion: Path, tmp_path: Path) -> None:
    """As it makes it once it has found a scale, but for the updates that it skips until then."""
    recipe = make_recipe(diffusion, tmp_path / "run", dtype="float16", **SMALL, **LORA)
    ours, other = Trainer(recipe), Trainer(recipe)
    row = ours.iteration(1)
    batch = other.collect(1, prompts_of_iteration(other.prompts, 1, 0, recipe.seed))
    scaler, steps = torch.amp.GradScaler("cpu", init_scale=2.0**16), other.optimizer.torch
    other_weights = list(other.parameters.values())
    while not steps.state:
        scale, tally = scaler.get_scale(), Tally(other.loss.metrics, len(other.table))
        ((calls, made),) = other.updates.plan(batch, 1, tally)
        # A scaler is there once it has scaled.
        scaler.scale(torch.zeros(()))
        other.updates.backward(batch, calls, made, tally, first=True, scale=scale)
        scaler.unscale_(steps)
        norm = torch.nn.utils.clip_grad_norm_(other_weights, recipe.train.max_grad_norm)
        scaler.step(steps)
        scaler.update()
        steps.zero_grad()
    assert (row["loss_scale"], row["grad_norm"]) == (scale, float(norm))
    assert all(torch.equal(ours.parameters[name], value) for name, value in other.parameters.items())


def test_what_no_scale_mends_ends_the_run(diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "LOSS_SCALE", 4.0)
    trainer = Trainer(make_recipe(diffusion, tmp_path / "run", dtype="float16", **SMALL, **LORA))
    backward, scales = trainer.updates.backward, []

    def broken(*arguments: Any, scale: float, **settings: Any) -> bool:
        scales.append(scale)
        changed = backward(*arguments, scale=scale, **settings)
        parameter = next(p for p in trainer.parameters.values() if p.grad is not None)
        parameter.grad = torch.full_like(parameter, torch.inf)
        return changed

    monkeypatch.setattr(trainer.updates, "backward", broken)
    with pytest.raises(RuntimeError, match=r"iteration 1: the gradient norm is \[inf\], want finite numbers"):
        trainer.run()
    assert scales == [4.0, 2.0, 1.0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_pixels_that_leave_the_range_are_not_scored(diffusion: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_recipe(diffusion, tmp_path / "run", frozen_dtype="float16", **SMALL))
    assert {parameter.dtype for parameter in trainer.model.vae.parameters()} == {torch.float16}
    trainer.model.vae.decoder.conv_in.weight.data *= 1e6
    with pytest.raises(RuntimeError, match=r"decode: got 3 of 3 samples .* what the VAE makes of finite latents"):
        trainer.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision": "bf16", **LORA}, r'train.mixed_precision: got "bf16" with model.dtype float16, want "no"'),
        ({}, r'model.dtype: got "float16" without model.lora, .* or train.master_dtype "float32"'),
        ({"family": "flux", **LORA}, r'model.dtype: got "float16" for flux, .*; float16 is for stable_diffusion, sd3'),
        ({"quantization": "fp8", **LORA}, r'model.quantization: got "fp8" with float16, want bfloat16'),
    ],
)
def test_where_float16_is_refused(diffusion: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(make_recipe(diffusion, tmp_path / "run", **{"dtype": "float16"} | changes))
