"""Families that edit the picture of a prompt: what is made of it, by what it is found again, and its size."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dancegrpo_fast.attention import choice
from dancegrpo_fast.memory.planning import planner, specs
from dancegrpo_fast.models import family_of, load_model
from dancegrpo_fast.models.planning import settings_of
from dancegrpo_fast.prompts import Prompt, load_prompts
from dancegrpo_fast.recipe import ModelSettings, Recipe, load_recipe

from ..release import release_but
from .cases import CASES, NEGATIVE, PROMPTS, load, make_recipe
from .checks import CPU
from .folders import save_qwen_image_edit

Base = Callable[[str], Path]
RECIPES = Path(__file__).parents[2] / "recipes"
EDITING = [name for name, case in CASES.items() if case.reference[0] is not None]
editing = pytest.mark.parametrize("family", EDITING)


def editing_recipe(base: Base, tmp_path: Path, family: str, **changes: Any) -> Recipe:
    settings = {"prompt_cache": str(tmp_path / "cache")} | changes
    return make_recipe(CASES[family], base(family), tmp_path / "run", **settings)


def planned_recipe(base: Base, tmp_path: Path, family: str) -> Recipe:
    return editing_recipe(base, tmp_path, family, dtype="bfloat16", lora=True, checkpointing="full")


@editing
def test_a_reference_belongs_to_its_prompt(base: Base, tmp_path: Path, family: str) -> None:
    recipe = editing_recipe(base, tmp_path, family)
    model, prompts = load(recipe)
    together = model.encode(prompts)["reference"]
    height, width = CASES[family].reference
    assert height is not None and width is not None
    # Tokens of 4 x 4 pixels.
    assert together.shape == (3, height * width // 16, model.latent_shape[1])
    assert not torch.equal(together[0], together[1])
    again, _ = load(recipe)
    for row in (2, 0):
        assert torch.equal(again.encode([prompts[row]])["reference"][0], together[row])
    held = replace(prompts[1], meta={"image": {"bytes": Path(prompts[1].meta["image"]).read_bytes(), "path": "1.png"}})
    assert again.encodes_with_vae([held]) and torch.equal(again.encode([held])["reference"][0], together[1])
    assert not again.encodes_with_vae([held])


@editing
def test_a_reference_without_a_size_has_that_of_the_samples(base: Base, tmp_path: Path, family: str) -> None:
    recipe = editing_recipe(base, tmp_path, family, reference_height=None, reference_width=None, height=24)
    model, prompts = load(recipe)
    smaller = model.at(replace(recipe.sampler, height=16))
    assert [one.encode(prompts)["reference"].shape[1] for one in (model, smaller)] == [24, 16]
    assert settings_of(recipe).reference_height == 24


def test_embeddings_depend_on_text_and_picture(base: Base, tmp_path: Path) -> None:
    recipe = editing_recipe(base, tmp_path, "qwen_image_edit")
    prompts = load_prompts(recipe.prompts)
    shutil.copy(prompts[0].meta["image"], tmp_path / "copy.png")
    copied, other = (
        Prompt(PROMPTS[0], {"image": image}) for image in (str(tmp_path / "copy.png"), prompts[1].meta["image"])
    )
    model: Any = load_model(recipe, CPU, [prompts[0], copied, other], training=False)
    # Of one picture in two places there is one row, and one of the negative prompt.
    keys = model._texts([prompts[0], copied, other])
    assert len(keys) == len(set(keys)) == 4
    found = model.encode([prompts[0], copied, other])
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        one, same, apart = found[name]
        assert torch.equal(one, same) and not torch.equal(one, apart)
    assert not torch.equal(found["prompt_embeds"], found["negative_prompt_embeds"])
    assert model.unconditional(4.0) == {} and model.unconditional(1.0) is None
    # What is not guided has no negative prompt.
    plain = load_model(editing_recipe(base, tmp_path, "qwen_image_edit", guidance_scale=1.0), CPU, prompts)
    assert not [name for name in plain.encode(prompts) if name.startswith("negative")]


def test_pipelines_with_other_templates_share_no_embeddings(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    shutil.copytree(base("qwen_image_edit"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "QwenImageEditPipeline"}))
    plus = editing_recipe(base, tmp_path, "qwen_image_edit")
    first = replace(plus, model=replace(plus.model, path=str(folder)))
    stores = [load(recipe)[0]._store.folder for recipe in (plus, first)]
    assert stores[0] != stores[1] and stores[0].parent == stores[1].parent


@pytest.mark.parametrize("pipeline", ["QwenImageEditPlusPipeline", "QwenImageEditPipeline"])
def test_tokens_of_text_and_picture_are_counted_as_they_are_encoded(tmp_path: Path, pipeline: str) -> None:
    folder = save_qwen_image_edit(tmp_path / "base", pipeline)
    recipe = make_recipe(CASES["qwen_image_edit"], folder, tmp_path / "run")
    prompts = load_prompts(recipe.prompts)
    # A picture twice as wide has other tokens.
    Image.new("RGB", (80, 20), "red").save(tmp_path / "wide.png")
    prompts.append(Prompt(PROMPTS[0], {"image": str(tmp_path / "wide.png")}))
    model: Any = load_model(recipe, CPU, prompts, training=False)
    without_encoder = model._load_pipeline(["tokenizer", "processor"])
    keys = model._texts(prompts)
    masks = model._store.rows(keys, [model.mask])[model.mask].sum(dim=1).tolist()
    assert [model._count_tokens(without_encoder, key) for key in keys] == masks
    assert model.encode(prompts)["prompt_embeds"].shape[1] == max(masks) > min(masks)
    # As long where only some of them are encoded.
    (reached,) = (load_model(recipe, CPU, prompts, reached=prompts[:1], training=False),)
    assert reached.encode(prompts[:1])["prompt_embeds"].shape[1] == max(masks)


def test_more_tokens_than_a_row_has_are_refused(base: Base, tmp_path: Path) -> None:
    recipe = editing_recipe(base, tmp_path, "qwen_image_edit", max_text_tokens=20)
    with pytest.raises(ValueError, match=r'model.max_text_tokens: got 20 for "a", which with its picture has [34]\d'):
        load(recipe)


@editing
def test_a_recipe_is_planned_with_its_reference(base: Base, tmp_path: Path, family: str) -> None:
    asked = settings_of(planned_recipe(base, tmp_path, family))
    height, width = asked.reference_height, asked.reference_width
    assert (height, width) == CASES[family].reference
    # As the command has it, of a folder and of the published model.
    without = asked.changed(reference_height=0, reference_width=0)
    assert without.changed(reference_height=height, reference_width=width) == asked
    spec, size = specs.resolve(asked.model), (1, *CASES[family].size)
    assert specs.tokens(spec, *size, (height, width)) == specs.tokens(spec, *size) + height * width // 16
    published = {"flux_kontext": "black-forest-labs/FLUX.1-Kontext-dev", "qwen_image_edit": "Qwen/Qwen-Image-Edit-2509"}
    assert specs.resolve(published[family]).family.reference


@editing
def test_the_recipe_says_how_large_pictures_are(family: str) -> None:
    recipe = load_recipe([str(RECIPES / f"{family}_lora_hps.yaml")])[0]
    asked = settings_of(recipe)
    assert recipe.model.family == family and asked.model == recipe.model.path
    assert (asked.reference_height, asked.reference_width) == (768, 768) == (asked.height, asked.width)


@pytest.mark.release
@editing
def test_a_reference_takes_memory_in_the_plan(base: Base, tmp_path: Path, family: str) -> None:
    asked = settings_of(planned_recipe(base, tmp_path, family))
    without = asked.changed(reference_height=0, reference_width=0)
    plans = [planner.plan(one, advise=False).phases for one in (asked, without)]
    peaks = [max(sum(phase.budget.values()) for phase in phases) for phases in plans]
    assert peaks[0] > peaks[1]


@pytest.mark.parametrize("family", release_but(("flux_kontext",), EDITING))
def test_attention_is_chosen_for_all_tokens(
    base: Base, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    choose = choice.choose

    def seen(model: Any, shapes: choice.Shapes, *given: Any, **more: Any) -> Any:
        asked.append(shapes.tokens)
        return choose(model, shapes, *given, **more)

    monkeypatch.setattr(choice, "choose", seen)
    model, prompts = load(editing_recipe(base, tmp_path, family, attention="auto"))
    embeds = model.encode(prompts)
    assert asked == [16 + embeds["reference"].shape[1] + embeds["prompt_embeds"].shape[1]]


def test_the_reference_is_split_among_processes_too(base: Base, tmp_path: Path) -> None:
    size = {"height": 12, "width": 12, "sequence_parallel": 2}
    recipe = editing_recipe(base, tmp_path, "flux_kontext", reference_height=20, reference_width=20, **size)
    model, prompts = load(recipe)
    # Nine tokens of the sample and 25 of the picture.
    assert model.encode(prompts)["reference"].shape[1] + model.latent_shape[0] == 34
    with pytest.raises(ValueError, match=r"sequence_parallel: got 2 for a sampler .*, which is 33 tokens"):
        load(editing_recipe(base, tmp_path, "flux_kontext", reference_height=16, reference_width=24, **size))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a family without": ("flux", {"reference_height": 16, "reference_width": 16}, "got 16 for flux, want null; flux_k"),
    "a side that is no token's": ("flux_kontext", {"reference_height": 18}, "got 18, want a multiple of 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_references_that_cannot_be(base: Base, tmp_path: Path, name: str) -> None:
    family, changes, message = REFUSED[name]
    recipe = editing_recipe(base, tmp_path, family, **changes)
    with pytest.raises(ValueError, match=f"model.reference_height: {message}"):
        load(recipe)
    if family == "flux":
        with pytest.raises(ValueError, match=message):
            settings_of(recipe)


def test_half_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.reference_height: got None with reference_width 16, want both"):
        ModelSettings("flux_kontext", "base", reference_width=16)
    with pytest.raises(ValueError, match=r"model.reference_width: got 0, want"):
        ModelSettings("flux_kontext", "base", reference_height=16, reference_width=0)


@editing
def test_a_prompt_without_a_picture_is_refused(base: Base, tmp_path: Path, family: str) -> None:
    recipe = editing_recipe(base, tmp_path, family)
    Path(recipe.prompts).write_text(json.dumps({"prompt": NEGATIVE}) + "\n")
    with pytest.raises(ValueError, match=r'prompts: got "x y" with image None, want an `image` column'):
        load(recipe)


def test_a_folder_of_another_familys_pipeline_is_refused(base: Base) -> None:
    for family, other in (("flux", "flux_kontext"), ("qwen_image_edit", "qwen_image")):
        for given, right in ((family, other), (other, family)):
            with pytest.raises(
                ValueError, match=f'model.family: got "{given}" for the .*Pipeline of .*, want "{right}"'
            ):
                family_of(ModelSettings(given, str(base(right))))
    # Weights of either may lie beside the other's parts.
    denoiser = str(base("flux_kontext"))
    assert family_of(ModelSettings("flux_kontext", str(base("flux")), denoiser=denoiser)).family == "flux_kontext"
