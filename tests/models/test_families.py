"""Every family against its pipeline, in what it loads and in what it saves."""

import hashlib
import importlib
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from dancegrpo_fast.evaluate import evaluate
from dancegrpo_fast.models import FAMILIES
from dancegrpo_fast.ops.noise import gaussian_noise
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.recipe import EvaluationSettings
from dancegrpo_fast.rng import derive_seed, generator
from dancegrpo_fast.train.calls import Policy
from dancegrpo_fast.train.draw import Draw

from ..release import release_but
from ..tolerances import assert_same_frames, assert_same_sample
from ..train import tiny
from .cases import CASES, NEGATIVE, PROMPTS, STEPS, Case, load, make_recipe
from .folders import BUILDERS, diffusers, load_pipeline

Base = Callable[[str], Path]
families = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def seeded(path: str) -> torch.Generator:
    """The noise of a first frame's latents."""
    image = diffusers.utils.load_image(path)
    return generator("first frame", hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest())


def pictures(case: Case, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The pipeline's arguments for the pictures of prompts."""
    if not case.image:
        return {}
    paths = [prompt.meta["image"] for prompt in prompts]
    images = [diffusers.utils.load_image(path) for path in paths]
    if case.reference == (None, None):
        return {"image": images, "generator": [seeded(path) for path in paths]}
    # The first pipeline of Qwen-Image-Edit resizes no list for its text encoder.
    return {"image": images if case.family == "flux_kontext" else images[0]}


def check_sample(case: Case, base: Path, output: Path, call: dict[str, Any], **changes: Any) -> None:
    """The ODE rollout of two prompts of different lengths in one batch, and the pipeline's own call."""
    recipe = make_recipe(case, base, output, **changes)
    model, prompts = load(recipe)
    sampler = recipe.sampler
    two = [prompts[0], prompts[2]]
    ids = torch.arange(2)
    noise = gaussian_noise(model.latent_shape, seed=1, sample_ids=ids)
    table, policy = model.table(sampler, deterministic=True), replace(Policy.of(recipe, model), rows=2)
    ours = Draw(policy, table, model.encode(two), seed=0).samples(noise, ids, ids).latents[:, -1]
    pipeline = load_pipeline(base, model._called_as)

    def called(rows: slice, kind: str) -> Tensor:
        chosen = two[rows]
        negative = {"negative_prompt": [NEGATIVE] * len(chosen)} if "negative_prompt" in call else {}
        result: Tensor = pipeline(
            prompt=[prompt.text for prompt in chosen],
            height=sampler.height,
            width=sampler.width,
            num_inference_steps=STEPS,
            latents=noise[rows].clone(),
            output_type=kind,
            return_dict=False,
            **(call | negative | pictures(case, chosen)),
        )[0]
        return result

    def run(kind: str) -> Tensor:
        # That of Qwen-Image-Edit takes one prompt.
        single = case.family == "qwen_image_edit"
        return torch.cat([called(slice(row, row + 1), kind) for row in range(2)]) if single else called(slice(2), kind)

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


ONE = {"guidance_scale": 1.0}
# The pipeline calls the model once for each half of guidance, ours once for both, whose sums have another order.
LEVELS_APART = {"skyreels_i2v": 1, "wan": 1}


@families
def test_the_picture_that_is_written_is_the_pipelines(base: Base, tmp_path: Path, case: Case) -> None:
    """Of one prompt, which fills the text where a pipeline pads it, in calls of one row; training has another size."""
    prompt = max(PROMPTS, key=len)
    if case.family in ("hunyuan_video", "skyreels_i2v"):
        case = replace(case, call=case.call | {"max_sequence_length": 13})
    height, width = case.size
    size = {"height": height, "width": width}
    scored = EvaluationSettings(
        samples_per_prompt=1,
        grid_samples=1,
        rewards=[tiny.reward("Brightness")],
        samplers=["ode"],
        num_steps=STEPS,
        guidance_scale=case.guidance,
        **size,
    )
    trained = {"height": 2 * height, "num_steps": 2, "guidance_scale": 1.0, "micro_batch": 1}
    recipe = make_recipe(case, base(case.family), tmp_path / "run", evaluation=scored, **trained)
    rows = Path(recipe.prompts).read_text().splitlines()
    Path(recipe.prompts).write_text(next(row for row in rows if json.loads(row)["prompt"] == prompt))
    evaluate(recipe, None, tmp_path / "out")
    with Image.open(tmp_path / "out" / "ode" / "00000" / "samples" / "0000.png") as file:
        written = np.stack([np.asarray(frame) for frame in ImageSequence.Iterator(file)])

    model, prompts = load(recipe)
    noise = gaussian_noise(
        model.at(scored.sampling(recipe.sampler)).latent_shape,
        seed=derive_seed(derive_seed(recipe.seed, "evaluation"), "noise"),
        sample_ids=torch.zeros(1, dtype=torch.int64),
    )
    pipeline = load_pipeline(base(case.family), model._called_as)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            # A matrix product of weights that ask for gradients may take another way.
            part.requires_grad_(False)
    call = case.call | ({"negative_prompt": [NEGATIVE]} if "negative_prompt" in case.call else {})
    call |= pictures(case, prompts)
    call |= {"num_inference_steps": STEPS, "output_type": "pil", "return_dict": False}
    made = pipeline(prompt=[prompt], latents=noise, **size, **call)[0][0]
    theirs = np.stack([np.asarray(frame) for frame in (made if isinstance(made, list) else [made])])
    assert written.shape == theirs.shape and theirs.std() > LEVELS_APART.get(case.family, 0)
    assert np.abs(written.astype(int) - theirs).max() <= LEVELS_APART.get(case.family, 0)


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "flux without guidance": ("flux", {"guidance_embeds": False}, {}, ONE),
    "v prediction": ("stable_diffusion", {"prediction_type": "v_prediction"}, {}, {}),
    "no guidance": ("stable_diffusion", {}, ONE, ONE),
    "image of a video model": ("hunyuan_video", {}, {"num_frames": 1}, {"frames": 1}),
    "skyreels without embedding": ("skyreels_i2v", {"guidance_embeds": False}, {}, {}),
    "sd3 without guidance, a shift of the size": ("sd3", {"use_dynamic_shifting": True}, ONE, ONE),
    "qwen without guidance": ("qwen_image", {}, {"true_cfg_scale": 1.0}, ONE),
    "qwen edit without guidance": ("qwen_image_edit", {}, {"true_cfg_scale": 1.0}, ONE),
    "qwen edit of two times": ("qwen_image_edit", {"zero_cond_t": True}, {}, {}),
    "qwen edit of the first version": ("qwen_image_edit", {"pipeline": "QwenImageEditPipeline"}, {}, {}),
    "wan without guidance": ("wan", {}, ONE, ONE),
    "wan with a time for each token": ("wan", {"expand_timesteps": True}, {}, {}),
}


REPEATED = ("qwen edit without guidance", "qwen edit of two times")


@pytest.mark.parametrize("variant", release_but(VARIANTS.keys() - set(REPEATED), VARIANTS))
def test_variants_are_the_pipelines(tmp_path: Path, variant: str) -> None:
    """The folder's settings, the call's, and the recipe's."""
    family, settings, call, changes = VARIANTS[variant]
    case = CASES[family]
    check_sample(case, BUILDERS[family](tmp_path / "base", **settings), tmp_path / "run", case.call | call, **changes)


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
    # As Hugging Face's tables hold it.
    held = replace(prompts[1], meta={"image": {"bytes": Path(prompts[1].meta["image"]).read_bytes(), "path": "1.png"}})
    assert again.encodes_with_vae([held]) and torch.equal(again.encode([held])["first_frame"][0], together[1])
    assert not again.encodes_with_vae([held])
    assert model.unconditional(5.0).keys() == model.encode(prompts).keys() - {"first_frame"}
    assert model.unconditional(1.0) is None
    assert NEGATIVE not in [prompt.text for prompt in prompts]


@families
def test_text_encoders_are_gone_before_the_denoiser_is_loaded(
    base: Base, tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[torch.nn.Module]] = []
    alive: list[list[bool]] = []
    recipe = make_recipe(case, base(case.family), tmp_path / "run", prompt_cache=str(tmp_path / "cache"))
    module, _, name = FAMILIES[case.family].partition(":")
    family = getattr(importlib.import_module(f"dancegrpo_fast.models.{module}"), name)
    pipeline, denoiser = getattr(diffusers, family.pipeline), getattr(diffusers, family.denoiser_class)
    load_pipeline, load_denoiser = pipeline.from_pretrained, denoiser.from_pretrained

    def seen_pipeline(*arguments: Any, **settings: Any) -> Any:
        made = load_pipeline(*arguments, **settings)
        parts = [getattr(made, name) for name in family.text_parts]
        encoders.extend(weakref.ref(part) for part in parts if isinstance(part, torch.nn.Module))
        return made

    def seen_denoiser(*arguments: Any, **settings: Any) -> Any:
        alive.append([encoder() is not None for encoder in encoders])
        return load_denoiser(*arguments, **settings)

    monkeypatch.setattr(pipeline, "from_pretrained", seen_pipeline)
    monkeypatch.setattr(denoiser, "from_pretrained", seen_denoiser)
    load(recipe)
    assert encoders and alive == [[False] * len(encoders)]
