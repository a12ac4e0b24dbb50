"""LoRA files of any writer, and whole weights, as a run's start: what diffusers' own pipeline makes of them."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dancegrpo_fast.models.loading import variant_of
from dancegrpo_fast.recipe import LoraSettings, ModelSettings, Recipe
from dancegrpo_fast.run.identity import model_identity

from ..release import release_but
from . import lora_files
from .cases import CASES, load, make_recipe
from .folders import diffusers, load_pipeline

Base = Callable[[str], Path]
# Of Wan's two transformers each has a file: test_experts.py.
families = pytest.mark.parametrize(
    "family", release_but(("flux", "stable_diffusion"), [name for name in CASES if name != "wan_a14b"])
)
LORA = LoraSettings(rank=2, alpha=6, target_modules=lora_files.TARGETS)


def recipe_from(base: Path, folder: Path, start: Path, lora: LoraSettings | None = LORA, **changes: Any) -> Recipe:
    family = next(name for name in CASES if re.fullmatch(rf"{name}\d", base.parent.name))
    settings = {"prompt_cache": str(base.parent / "cache"), "start_from": str(start), **changes}
    recipe = make_recipe(CASES[family], base, folder / "run", **settings)
    return replace(recipe, model=replace(recipe.model, lora=lora))


@families
@pytest.mark.parametrize("writer", lora_files.WRITERS)
def test_layers_are_what_was_written(base: Base, tmp_path: Path, family: str, writer: str) -> None:
    rank, alpha = (4, 6) if "rslora" in writer else (2, 6)
    wanted = lora_files.write(writer, base(family), tmp_path / "file", rank, alpha)
    alphas = {"diffusers without alpha": 2, "peft with rslora": 12}
    if writer == "diffusers without alpha":
        wanted = {name: (down, up, 1.0) for name, (down, up, _) in wanted.items()}
    lora = replace(LORA, rank=rank, alpha=alphas.get(writer, alpha))
    model, _ = load(recipe_from(base(family), tmp_path, tmp_path / "file", lora))
    lora_files.assert_same(lora_files.layers(model.denoiser), wanted)
    trained = {name for name, parameter in model.denoiser.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{part}.default.weight" for name in wanted for part in "AB"}
    if writer == "diffusers":
        narrow, _ = load(recipe_from(base(family), tmp_path, tmp_path / "file", lora, dtype="bfloat16"))
        lora_files.assert_same(lora_files.layers(narrow.denoiser), wanted)


@families
def test_merged_layers_are_the_pipelines(base: Base, tmp_path: Path, family: str) -> None:
    lora_files.write("diffusers", base(family), tmp_path / "file")
    model, _ = load(recipe_from(base(family), tmp_path, tmp_path / "file", None, start_as="merged"))
    pipeline = load_pipeline(base(family))
    pipeline.load_lora_weights(tmp_path / "file")
    part = model.denoiser_part
    pipeline.fuse_lora(components=[part])
    theirs = getattr(pipeline, part)
    theirs.unload_lora()
    found, wanted = model.denoiser.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
    # Any rank trains on top.
    again, _ = load(recipe_from(base(family), tmp_path, tmp_path / "file", replace(LORA, rank=3), start_as="merged"))
    assert {layer.r["default"] for layer in again.denoiser.modules() if hasattr(layer, "lora_A")} == {3}


def test_kohya_files(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kohya.safetensors"
    wanted = lora_files.write_kohya(base("stable_diffusion"), file)
    model, _ = load(recipe_from(base("stable_diffusion"), tmp_path, file, replace(LORA, alpha=1)))
    lora_files.assert_same(lora_files.layers(model.denoiser), wanted)
    assert "2 tensors (text_encoder.text_model.encoder.layers.0.mlp.fc1" in capsys.readouterr().out
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base("stable_diffusion"))
    pipeline.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="default")
    theirs = {name: (a.float(), b.float(), scale) for name, (a, b, scale) in lora_files.layers(pipeline.unet).items()}
    lora_files.assert_same(theirs, wanted)
    # An alpha of one layer's own.
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("lora_unet_") and name.endswith(".alpha"))
    save_file(tensors | {name: torch.tensor(0.5)}, file)
    with pytest.raises(ValueError, match=r"model.lora.alpha: got 1, want 0.5, which .* has for .*, or model.start_as"):
        load(recipe_from(base("stable_diffusion"), tmp_path, file, replace(LORA, alpha=1)))


@pytest.mark.parametrize("family", release_but(("flux", "flux_kontext"), [one for one in CASES if one != "wan_a14b"]))
def test_alphas_beside_the_layers_are_kept(base: Base, tmp_path: Path, family: str) -> None:
    """As trainers write them that know no metadata."""
    written = lora_files.write("diffusers without alpha", base(family), tmp_path / "file")
    (file,) = (tmp_path / "file").iterdir()
    tensors = load_file(file)
    names = [name.replace("lora_A.weight", "alpha") for name in tensors if "lora_A" in name]
    save_file(tensors | {name: torch.tensor(6.0) for name in names}, file)
    model, _ = load(recipe_from(base(family), tmp_path, file))
    lora_files.assert_same(
        lora_files.layers(model.denoiser), {name: (*pair, 3.0) for name, (*pair, _) in written.items()}
    )


def test_other_layers_are_refused_with_what_the_file_has(base: Base, tmp_path: Path) -> None:
    flux, file = base("flux"), tmp_path / "file" / "pytorch_lora_weights.safetensors"
    lora_files.write("diffusers without alpha", flux, file.parent)
    tensors = load_file(file)
    name = next(iter(tensors))
    merged = r', or model.start_as "merged"$'
    for lora, message in (
        (replace(LORA, rank=8, alpha=2), rf"model.lora.rank: got 8, want 2, which .* has for .*{merged}"),
        (LORA, rf"model.lora.alpha: got 6, want 2, which {file} has for .*{merged}"),
        (
            LoraSettings(rank=2, alpha=2, target_modules=["to_q", "to_k"]),
            r"model.lora.target_modules: got \['to_q', 'to_k'\], want \['to_k', 'to_out.0', 'to_q', 'to_v'\], as .* "
            rf"has .*{merged}",
        ),
        (None, rf"model.lora: got null, want that of {file}{merged}"),
    ):
        with pytest.raises(ValueError, match=message):
            load(recipe_from(flux, tmp_path, file, lora))
    for changed, message in (
        ({f"{name[:-7]}.dora_scale": torch.ones(1)}, r"got .*dora_scale, want LoRA without DoRA"),
        ({"transformer.nowhere.lora_A.weight": torch.ones(2, 4)}, r"got LoRA layers .*nowhere"),
        ({name: torch.ones(2, 5)}, r"got LoRA layers that do not fit the denoiser: .*"),
        ({"vae.to_q.lora_A.weight": torch.ones(2, 4)}, r"got vae.to_q.lora_A.weight, want names of transformer or of"),
    ):
        save_file(tensors | changed, tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match=rf"changed.safetensors: {message}"):
            load(recipe_from(flux, tmp_path, tmp_path / "changed.safetensors"))
    save_file({"text_encoder.to_q.lora_A.weight": torch.ones(2, 4)}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"text.safetensors: got LoRA layers of text encoders alone"):
        load(recipe_from(flux, tmp_path, tmp_path / "text.safetensors"))


def test_what_is_no_start_is_refused(base: Base, tmp_path: Path) -> None:
    flux = base("flux")
    (tmp_path / "two").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"lora": torch.ones(1)}, tmp_path / "two" / name)
    (tmp_path / "lora.bin").touch()
    (tmp_path / "damaged.safetensors").write_text("no")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.json").write_text("{}")
    for start, message in (
        ("absent", r"absent, which does not exist"),
        ("two", r"two, which holds a.safetensors, b.safetensors; want"),
        ("empty", r"empty, which holds no safetensors file; want"),
        ("begun", r"begun, which holds a run without a checkpoint yet; want"),
        ("lora.bin", r"lora.bin, want .safetensors"),
        ("damaged.safetensors", r"damaged.safetensors, want a safetensors file: "),
    ):
        with pytest.raises(ValueError, match=rf"model.start_from: got .*{message}"):
            load(recipe_from(flux, tmp_path, tmp_path / start))
    with pytest.raises(ValueError, match=r"model.denoiser: got .* beside a whole denoiser in model.start_from"):
        load(recipe_from(flux, tmp_path, flux, denoiser=str(flux)))
    with pytest.raises(ValueError, match=r'model.start_as: got "merged" of all weights in '):
        load(recipe_from(flux, tmp_path, flux, start_as="merged"))
    for changes, message in (
        ({}, r'model.start_as: got "merged" without model.start_from'),
        ({"start_from": "x", "quantization": "nf4", "dtype": "bfloat16", "lora": LORA}, r'"merged" into nf4 weights'),
    ):
        with pytest.raises(ValueError, match=message):
            ModelSettings("flux", "x", start_as="merged", **changes)


def test_whole_denoisers(base: Base, tmp_path: Path) -> None:
    """From another folder; LoRA layers are new on top."""
    denoiser, _ = lora_files.denoiser_of(base("flux"))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.01)
    denoiser.save_pretrained(tmp_path / "other" / "transformer")
    for start in ("other", "other/transformer", "other/transformer/diffusion_pytorch_model.safetensors"):
        model, _ = load(recipe_from(base("flux"), tmp_path, tmp_path / start, None))
        found = model.denoiser.state_dict()
        assert all(torch.equal(found[name], value) for name, value in denoiser.state_dict().items())
    model, _ = load(recipe_from(base("flux"), tmp_path, tmp_path / "other"))
    assert {name for name, p in model.denoiser.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{part}.default.weight" for name in lora_files.layers(model.denoiser) for part in "AB"
    }


def test_weights_in_one_variant_only(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the hub has many: every part as `*.fp16.safetensors`, in whose numbers nothing else is seen."""
    flux, half = base("flux"), tmp_path / "half"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(flux).to(torch.float16)
    pipeline.save_pretrained(half, variant="fp16")
    pipeline.save_pretrained(tmp_path / "plain")
    found = [
        load(make_recipe(CASES["flux"], folder, tmp_path / "run", prompt_cache=str(folder / "cache")))
        for folder in (half, tmp_path / "plain")
    ]
    assert "transformer: weights of the variant fp16" in capsys.readouterr().out
    (ours, prompts), (theirs, _) = found
    wanted = theirs.denoiser.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in ours.denoiser.state_dict().items())
    encoded = theirs.encode(prompts)
    assert all(torch.equal(value, encoded[name]) for name, value in ours.encode(prompts).items())
    latents = torch.ones(1, *ours.latent_shape)
    assert torch.equal(ours.decode(latents), theirs.decode(latents))
    part = half / "transformer"
    (part / "diffusion_pytorch_model.fp16.safetensors").rename(part / "diffusion_pytorch_model.a.safetensors")
    shutil.copy(part / "diffusion_pytorch_model.a.safetensors", part / "diffusion_pytorch_model.b.safetensors")
    with pytest.raises(ValueError, match=r"transformer: got weights in the variants \['a', 'b'\], want one of them"):
        variant_of(part)


def test_a_denoiser_in_a_file(base: Base, tmp_path: Path) -> None:
    """With diffusers' names; with others it is refused with what was wanted."""
    flux, file = base("flux"), tmp_path / "tuned.safetensors"
    denoiser, _ = lora_files.denoiser_of(flux)
    tensors = {name: 1.01 * value for name, value in denoiser.state_dict().items()}
    save_file(tensors, file)
    settings = {"prompt_cache": str(flux.parent / "cache"), "denoiser": str(file)}
    recipe = make_recipe(CASES["flux"], flux, tmp_path / "run", **settings)
    model, _ = load(recipe)
    found = model.denoiser.state_dict()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert model.planned_as == str(flux)
    assert "transformer/tuned.safetensors" in model_identity(model)["files"]
    name = "x_embedder.weight"
    save_file({one: value for one, value in tensors.items() if one != name}, file)
    with pytest.raises(ValueError, match=rf"model.denoiser: got {file}, want weights of FluxTransformer2DModel"):
        load(recipe)
