"""What every family must do: sample as its diffusers pipeline, train with ratio 1, and give its LoRA back."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast import checkpoint
from dancegrpo_fast.config import Recipe
from dancegrpo_fast.models import load_model
from dancegrpo_fast.ops.noise import gaussian_noise
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.rollout import Policy, rollout
from dancegrpo_fast.trainer import Trainer

from ..tolerances import assert_same_frames, assert_same_sample
from ..train.tiny import LoraSettings, make_recipe
from .folders_more import diffusers

TEXTS = ["a red fox", "b"]
CPU = torch.device("cpu")


def sample(base: Path, output: Path, **changes: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The recipe's sampler settings, initial noise, last latents and frames of an ODE rollout of two prompts."""
    recipe = make_recipe(base, output, prompt_cache=str(output / "cache"), micro_batch=2, num_steps=3, **changes)
    prompts = [Prompt(text, {}) for text in TEXTS]
    model = load_model(recipe, CPU, prompts)
    scale = recipe.sampler.guidance_scale
    ids = torch.arange(2)
    noise = gaussian_noise(model.latent_shape, seed=3, sample_ids=ids)
    trajectory = rollout(
        Policy(model, 2, scale, model.unconditional(scale)),
        model.table(recipe.sampler, deterministic=True),
        noise,
        1,
        model.encode(prompts),
        seed=0,
        sample_ids=ids,
        shared_noise=False,
    )
    with torch.no_grad():
        return recipe.sampler, noise, trajectory.latents[:, -1], model.decode(trajectory.denoised)


def check_sample(base: Path, output: Path, call: dict[str, Any], **changes: Any) -> None:
    """Our ODE rollout against the pipeline's own call, prompts of different lengths in one batch.

    Args:
        base: the model folder.
        output: of the run.
        call: arguments of the pipeline for this guidance.
        changes: of the recipe.
    """
    sampler, noise, latents, frames = sample(base, output, **changes)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    shared = {"height": sampler.height, "width": sampler.width, "num_inference_steps": 3, "return_dict": False} | call
    with torch.no_grad():
        theirs = pipeline(TEXTS, latents=noise.clone(), output_type="latent", **shared)[0]
        pixels = pipeline(TEXTS, latents=noise.clone(), output_type="pt", **shared)[0]
    assert_same_sample(latents, theirs)
    assert not torch.equal(latents[0], latents[1])
    assert_same_frames(frames, pixels if pixels.ndim == 5 else pixels.unsqueeze(1))


def small_recipe(base: Path, output: Path, **changes: Any) -> Recipe:
    small = {"prompts_per_iteration": 2, "group_size": 2, "num_steps": 3, "iterations": 3}
    return make_recipe(base, output, prompt_cache=str(base.parent / "cache"), **small | changes)


def train(base: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` of all iterations, the first update of each with ratio 1 and a gradient."""
    recipe = small_recipe(base, output, **changes)
    Trainer(recipe).run()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == recipe.train.iterations
    for row in rows:
        assert row["ratio_first_update_max_dev"] == 0.0
        assert row["grad_norm"] > 0.0
    return rows


def weights(output: Path) -> dict[str, Tensor]:
    """Trained tensors of the last checkpoint."""
    return checkpoint.load(checkpoint.complete(output / "checkpoints")[-1])[0]["model"]


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def check_training(base: Path, output: Path, **changes: Any) -> None:
    """Calls of one row and of all four, full and LoRA, with block ops, and two of them without, to the same bits."""
    for micro_batch, lora, twice in ((1, False, True), (4, True, True), (4, False, False), (1, True, False)):
        options = changes | {"micro_batch": micro_batch, "lora": LoraSettings(rank=2, alpha=4) if lora else None}
        ours = output / f"{micro_batch}-{lora}"
        train(base, ours, block_ops="lossless", **options)
        if twice:
            plain = output / f"{ours.name}-plain"
            train(base, plain, **options)
            assert_same_weights(ours, plain)


def check_resume_and_policies(base: Path, output: Path, **changes: Any) -> None:
    """A run continued after its first iteration, and one under every checkpoint policy, end in the same bits."""
    for lora in (None, LoraSettings(rank=2, alpha=4)):
        options = changes | {"lora": lora, "micro_batch": 4}
        whole, parts = output / f"whole-{lora is None}", output / f"parts-{lora is None}"
        train(base, whole, **options)
        Trainer(small_recipe(base, parts, **options | {"iterations": 1})).run()
        Trainer(small_recipe(base, parts, **options), resume="auto").run()
        assert_same_weights(whole, parts)
    for policy in ("full", "attention", "matmul", "first:1"):
        train(base, output / policy, checkpointing=policy, **changes | {"lora": None, "micro_batch": 4})
        assert_same_weights(output / "whole-True", output / policy)


def check_lora_round_trip(base: Path, output: Path, **changes: Any) -> None:
    """What a run saves, `load_lora_weights` gives back bit for bit, with its scale."""
    train(base, output, lora=LoraSettings(rank=2, alpha=6), iterations=1, **changes)
    trained = weights(output)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(output / "model", adapter_name="default")
    loaded = dict(pipeline.transformer.named_parameters())
    assert trained and all(torch.equal(loaded[name], value) for name, value in trained.items())
    assert any(bool(value.any()) for name, value in trained.items() if "lora_B" in name)
    layers = [module for module in pipeline.transformer.modules() if hasattr(module, "lora_A")]
    assert layers and all(layer.scaling["default"] == 3.0 for layer in layers)
