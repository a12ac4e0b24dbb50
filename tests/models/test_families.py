"""FLUX, Stable Diffusion, HunyuanVideo and SkyReels against their pipelines, and in training."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops.noise import gaussian_noise
from dancegrpo_fast.rng import generator
from dancegrpo_fast.rollout import Policy, rollout
from dancegrpo_fast.trainer import Trainer

from ..tolerances import assert_same_frames, assert_same_sample
from .cases import CASES, NEGATIVE, STEPS, Case, load, make_recipe
from .checks_more import assert_same_weights, weights
from .folders import diffusers, save_flux, save_hunyuan_video, save_skyreels, save_stable_diffusion

Base = Callable[[str], Path]
POLICIES = ("none", "full", "attention", "matmul", "first:1")
families = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def seeded(path: str) -> torch.Generator:
    """The noise of a first frame's latents."""
    image = diffusers.utils.load_image(path)
    return generator("first frame", hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest())


def check_sample(case: Case, base: Path, output: Path, call: dict[str, Any], **changes: Any) -> None:
    """The ODE rollout of two prompts of different lengths in one batch, and the pipeline's own call."""
    recipe = make_recipe(case, base, output, **changes)
    model, prompts = load(recipe)
    scale, sampler = recipe.sampler.guidance_scale, recipe.sampler
    two = [prompts[0], prompts[2]]
    ids = torch.arange(2)
    noise = gaussian_noise(model.latent_shape, seed=1, sample_ids=ids)
    ours = rollout(
        Policy(model, 2, scale, model.unconditional(scale)),
        model.table(sampler, deterministic=True),
        noise,
        1,
        model.encode(two),
        seed=0,
        sample_ids=ids,
        shared_noise=False,
    ).latents[:, -1]
    pipeline = getattr(diffusers, model.pipeline).from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)

    def run(kind: str) -> Tensor:
        images = {}
        if case.image:
            paths = [prompt.meta["image"] for prompt in two]
            images = {
                "image": [diffusers.utils.load_image(path) for path in paths],
                "generator": [seeded(path) for path in paths],
            }
        result: Tensor = pipeline(
            prompt=[prompt.text for prompt in two],
            height=sampler.height,
            width=sampler.width,
            num_inference_steps=STEPS,
            latents=noise.clone(),
            output_type=kind,
            return_dict=False,
            **(call | images),
        )[0]
        return result

    theirs, pixels = run("latent"), run("pt")
    assert_same_sample(ours, theirs)
    assert not torch.equal(ours[0], ours[1])
    with torch.no_grad():
        frames = model.decode(theirs)
    assert frames.shape == (2, sampler.frames, 3, sampler.height, sampler.width)
    assert_same_frames(frames, pixels if pixels.ndim == 5 else pixels.unsqueeze(1))


@families
def test_the_ode_and_its_frames_are_the_pipelines(base: Base, tmp_path: Path, case: Case) -> None:
    check_sample(case, base(case.family), tmp_path / "run", case.call)


VARIANTS = {
    "flux without guidance": ("flux", save_flux, {"guidance_embeds": False}, {}, {"guidance_scale": 1.0}),
    "v prediction": ("stable_diffusion", save_stable_diffusion, {"prediction_type": "v_prediction"}, {}, {}),
    "no guidance": ("stable_diffusion", save_stable_diffusion, {}, {"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    "image of a video model": ("hunyuan_video", save_hunyuan_video, {}, {"num_frames": 1}, {"frames": 1}),
    "skyreels without embedding": ("skyreels_i2v", save_skyreels, {"guidance_embeds": False}, {}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_the_pipelines(tmp_path: Path, variant: str) -> None:
    family, build, settings, call, changes = VARIANTS[variant]
    case = CASES[family]
    check_sample(case, build(tmp_path / "base", **settings), tmp_path / "run", case.call | call, **changes)


def train(case: Case, base: Path, output: Path, resume: str | None = None, **changes: Any) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`."""
    recipe = make_recipe(case, base, output, **changes)
    Trainer(recipe, resume).run()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == recipe.train.iterations
    for row in rows:
        assert row["ratio_first_update_max_dev"] == 0.0
        assert row["grad_norm"] > 0.0
    return rows


@families
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_training_has_ratio_one_and_neither_block_ops_nor_resuming_change_a_bit(
    base: Base, tmp_path: Path, case: Case, micro_batch: int
) -> None:
    train(case, base(case.family), tmp_path / "plain", micro_batch=micro_batch)
    again: dict[str, Any] = {"micro_batch": micro_batch, "block_ops": "lossless" if case.patched else "off"}
    train(case, base(case.family), tmp_path / "again", iterations=2, **again)
    train(case, base(case.family), tmp_path / "again", "auto", **again)
    assert_same_weights(tmp_path / "plain", tmp_path / "again")


@families
def test_lora_resumes_to_the_same_bits_and_is_what_the_pipeline_loads(base: Base, tmp_path: Path, case: Case) -> None:
    ops = "lossless" if case.patched else "off"
    train(case, base(case.family), tmp_path / "whole", lora=True, block_ops=ops)
    train(case, base(case.family), tmp_path / "parts", lora=True, block_ops=ops, iterations=2)
    train(case, base(case.family), tmp_path / "parts", "auto", lora=True, block_ops=ops)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")

    trained = weights(tmp_path / "whole")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base(case.family))
    pipeline.load_lora_weights(tmp_path / "whole" / "model", adapter_name="default")
    denoiser = pipeline.unet if case.family == "stable_diffusion" else pipeline.transformer
    loaded = dict(denoiser.named_parameters())
    assert trained and all(torch.equal(loaded[name], value) for name, value in trained.items())
    assert any(bool(value.any()) for name, value in trained.items() if "lora_B" in name)
    layers = [module for module in denoiser.modules() if hasattr(module, "lora_A")]
    assert layers and all(layer.scaling["default"] == 3.0 for layer in layers)


@families
def test_every_checkpoint_policy_trains_to_the_same_bits(base: Base, tmp_path: Path, case: Case) -> None:
    for policy in POLICIES:
        train(case, base(case.family), tmp_path / policy, iterations=1, checkpointing=policy)
        assert_same_weights(tmp_path / "none", tmp_path / policy)


@families
def test_what_is_saved_is_a_denoiser_folder(base: Base, tmp_path: Path, case: Case) -> None:
    model, _ = load(make_recipe(case, base(case.family), tmp_path / "run"))
    model.save(model.denoiser, tmp_path / "saved")
    again = type(model.denoiser).from_pretrained(tmp_path / "saved" / model.denoiser_part)
    wanted = model.denoiser.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())


def test_the_first_frame_belongs_to_its_prompt(base: Base, tmp_path: Path) -> None:
    model, prompts = load(make_recipe(CASES["skyreels_i2v"], base("skyreels_i2v"), tmp_path / "run"))
    together = model.encode(prompts)["first_frame"]
    assert together.shape == (3, *model.latent_shape[:1], *model.latent_shape[2:])
    again, _ = load(make_recipe(CASES["skyreels_i2v"], base("skyreels_i2v"), tmp_path / "run"))
    for row in (2, 0):
        assert torch.equal(again.encode([prompts[row]])["first_frame"][0], together[row])
    assert model.unconditional(5.0).keys() == model.encode(prompts).keys() - {"first_frame"}
    assert model.unconditional(1.0) is None
    assert NEGATIVE not in [prompt.text for prompt in prompts]
