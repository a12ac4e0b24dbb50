"""Where a model's parts come from, in which precision, which prompts are encoded, and what is on the device when."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.models import load_model, setup
from dancegrpo_fast.models.loading import find_denoiser, find_folder, published_as
from dancegrpo_fast.models.planning import settings_of
from dancegrpo_fast.processes import PATIENCE, Processes
from dancegrpo_fast.prompts import Prompt, load_prompts, prompts_of_iteration, prompts_of_run
from dancegrpo_fast.recipe import EvaluationSettings, load_recipe
from dancegrpo_fast.train.loop import Trainer
from dancegrpo_fast.train.residence import Residence

from ..processes import together
from ..release import release_but
from ..train.tiny import reward
from .cases import CASES, load, make_recipe, shards
from .checks import CPU
from .folders import diffusers

Base = Callable[[str], Path]
WORKER = Path(__file__).with_name("loading_worker.py")
RECIPES = Path(__file__).parents[2] / "recipes"


def texts_in(store: Any) -> set[str]:
    return {text for texts in shards(store.folder) for text in texts}


def test_parts_are_on_the_device_when_they_run(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    last: list[Any] = [None]

    def watch(owner: Any, method: str, part: str) -> None:
        original = getattr(owner, method)

        def runs(*arguments: Any, **keywords: Any) -> Any:
            # Before there is a residence, all is on the device.
            assert last[0] in (None, part)
            if method == "encode":
                encoded.append(last[0])
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, method, runs)

    use = Residence.use

    def used(self: Residence, needed: Any) -> None:
        last[0] = needed
        use(self, needed)

    monkeypatch.setattr(Residence, "use", used)
    watch(diffusers.AutoencoderKLHunyuanVideo, "encode", "vae")
    watch(diffusers.AutoencoderKLHunyuanVideo, "decode", "vae")
    watch(diffusers.HunyuanVideoTransformer3DModel, "forward", "denoiser")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "judged.png")
    (judged := tmp_path / "judged.jsonl").write_text(json.dumps({"prompt": "a", "image": "judged.png"}) + "\n")
    evaluation = EvaluationSettings(
        prompts=str(judged), samples_per_prompt=2, grid_samples=2, rewards=[reward("Brightness")]
    )
    small = {"offload": ["denoiser", "vae"], "prompts_per_iteration": 1, "micro_batch": 2, "group_size": 2}
    skyreels = CASES["skyreels_i2v"], base("skyreels_i2v")
    Trainer(make_recipe(*skyreels, tmp_path / "run", evaluation=evaluation, **small)).run()
    # One while the model is set up, one when its rows are compared, the evaluation's, and the last iteration's.
    assert encoded == [None, "vae", "vae", "vae"]


def test_prompts_of_a_run_are_those_of_its_iterations() -> None:
    prompts = [Prompt(text, {}) for text in "abcdefg"]
    for count, iterations in ((2, 1), (2, 3), (3, 2), (3, 5), (9, 1)):
        reached = [prompt.text for prompt in prompts_of_run(prompts, count, iterations, seed=5)]
        each = [prompt.text for one in range(iterations) for prompt in prompts_of_iteration(prompts, count, one, 5)]
        assert reached == list(dict.fromkeys(each))


def test_a_run_encodes_what_it_reaches_and_its_continuation_the_rest(base: Base, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"prompts_per_iteration": 1, "micro_batch": 3, "prompt_cache": str(tmp_path / "cache")}
    recipe = make_recipe(CASES["hunyuan_video"], base("hunyuan_video"), tmp_path / "run", iterations=1, **settings)
    first = Trainer(recipe)
    reached = [prompt.text for prompt in prompts_of_run(first.prompts, 1, 3, recipe.seed)]
    assert texts_in(first.model._store) == {reached[0]}  # type: ignore[attr-defined]
    first.run()
    longer = Trainer(replace(recipe, train=replace(recipe.train, iterations=2)), "auto")
    assert texts_in(longer.model._store) == set(reached[:2])  # type: ignore[attr-defined]
    # However long the prompts that are not encoded are, text has the length that it has in a run of all.
    whole, prompts = load(recipe)
    embeds = whole.encode(prompts)["prompt_embeds"]
    assert longer.model.encode([prompts[0]])["prompt_embeds"].shape[1:] == embeds.shape[1:]
    longer.run()


@pytest.mark.parametrize("family", ["hunyuan_video", "skyreels_i2v", "qwen_image"])
def test_tokens_are_counted_as_the_pipeline_counts_them(base: Base, tmp_path: Path, family: str) -> None:
    recipe = make_recipe(CASES[family], base(family), tmp_path / "run", max_text_tokens=256)
    prompts = load_prompts(recipe.prompts)
    prompts += [Prompt("", prompts[0].meta), Prompt(" ".join("abcdefgh" * 40), prompts[0].meta)]
    model: Any = load_model(recipe, CPU, prompts, training=False)
    tokenizers = model._load_pipeline([name for name in model.text_parts if name.startswith("tokenizer")])
    rows = model._store.rows([prompt.text for prompt in prompts], [model.mask])[model.mask]
    assert [model._count_tokens(tokenizers, prompt.text) for prompt in prompts] == rows.sum(dim=1).tolist()
    assert rows.sum(dim=1).max() == rows.shape[1] > rows.sum(dim=1).min()


def embeds_and_frames(
    family: str, folder: Path, output: Path, dtype: str, frozen: str | None
) -> tuple[dict[str, Tensor], Tensor, torch.dtype]:
    """What the denoiser sees of the prompts, a decode, and the dtype of the store."""
    settings: dict[str, Any] = {"dtype": dtype, "frozen_dtype": frozen, "prompt_cache": str(output / "cache")}
    model, prompts = load(make_recipe(CASES[family], folder, output / "run", **settings))
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frames = model.decode(latents)
    assert model.dtype in {value.dtype for value in model.denoiser.parameters()}
    floating = {name: value for name, value in model.encode(prompts).items() if value.is_floating_point()}
    assert {value.dtype for value in floating.values()} == {model.dtype}
    (store,) = (output / "cache").iterdir()
    assert store == model._store.folder
    return floating, frames, model._store.rows(model._texts(prompts), ["prompt_embeds"])["prompt_embeds"].dtype


@pytest.mark.parametrize("family", [name for name in CASES if name != "wan_a14b"])
def test_frozen_parts_are_in_bfloat16_beside_a_float32_denoiser(base: Base, tmp_path: Path, family: str) -> None:
    low = embeds_and_frames(family, base(family), tmp_path / "low", "bfloat16", None)
    mixed = embeds_and_frames(family, base(family), tmp_path / "mixed", "float32", "bfloat16")
    assert low[2] == mixed[2] == torch.bfloat16
    # The VAE and the encoders make of anything what they make beside a denoiser of their own dtype.
    assert torch.equal(low[1], mixed[1])
    for name in low[0].keys() - {"first_frame", "reference"}:
        assert torch.equal(mixed[0][name], low[0][name].float())


def test_embeddings_are_stored_as_the_denoiser_sees_them(base: Base, tmp_path: Path) -> None:
    high = embeds_and_frames("flux", base("flux"), tmp_path / "high", "float32", None)
    mixed = embeds_and_frames("flux", base("flux"), tmp_path / "mixed", "bfloat16", "float32")
    assert (high[2], mixed[2]) == (torch.float32, torch.bfloat16)
    assert torch.equal(high[1], mixed[1])
    assert all(torch.equal(mixed[0][name], value.bfloat16()) for name, value in high[0].items())


def test_a_decode_is_planned_as_wide_as_the_vae_is(base: Base, tmp_path: Path) -> None:
    recipe = make_recipe(CASES["flux"], base("flux"), tmp_path / "run", memory_gib=1.0)
    narrow = replace(recipe, model=replace(recipe.model, frozen_dtype="bfloat16"))
    model, _ = load(recipe)
    found = [setup._iteration(model, one, CPU, text_tokens=3) for one in (recipe, narrow)]
    wide, half = (one.decode for one in found if one is not None)
    assert wide is not None and half is not None and wide.weights == 2 * half.weights > 0
    assert wide.peak == {name: 2 * size for name, size in half.peak.items()}


@pytest.mark.parametrize("where", release_but(("subfolder",), ["subfolder", "root"]))
def test_a_denoiser_from_elsewhere(base: Base, tmp_path: Path, where: str) -> None:
    flux = base("flux")
    without, other = tmp_path / "without", tmp_path / "other"
    shutil.copytree(flux, without, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(flux / "transformer", other / "transformer" if where == "subfolder" else other)
    settings = {"prompt_cache": str(tmp_path / "cache")}
    plain, _ = load(make_recipe(CASES["flux"], flux, tmp_path / "run", **settings))
    recipe = make_recipe(CASES["flux"], without, tmp_path / "run", denoiser=str(other), **settings)
    model, _ = load(recipe)
    assert model.planned_as == str(model.denoiser_path)
    for name, value in plain.denoiser.state_dict().items():
        assert torch.equal(value, model.denoiser.state_dict()[name])
    assert model._store.folder == plain._store.folder
    with pytest.raises(ValueError, match=r"model.denoiser: got .*without, want config.json in it or in its transf"):
        load(replace(recipe, model=replace(recipe.model, denoiser=str(without))))


def test_a_denoiser_on_the_hub(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(base("flux"))

    def download(name: str, **parts: None) -> str:
        asked.append((name, "transformer" in parts))
        return str(base("flux"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert find_denoiser("owner/tuned", "transformer") == base("flux") / "transformer"
    files = ["config.json", "diffusion_pytorch_model*.safetensors*"]
    assert asked.pop() == ("owner/tuned", [*files, *(f"transformer/{file}" for file in files)])
    # The planner has the VAE's configuration too of what is published, and no other name on the hub is asked for.
    assert published_as("Skywork/SkyReels-V1-Hunyuan-I2V", tmp_path) == "skyreels-i2v"
    assert published_as("owner/tuned", tmp_path) == str(tmp_path)
    # A denoiser that is not used need not be downloaded.
    assert find_folder("owner/base", "transformer") == base("flux")
    assert asked.pop() == ("owner/base", True)

    def unreachable(name: str, **settings: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"model.denoiser: got owner/tuned, want .* can be reached \(no network\)"):
        find_denoiser("owner/tuned", "transformer")


def test_recipes_name_what_is_published() -> None:
    skyreels = load_recipe([str(RECIPES / "skyreels_i2v_mq.yaml")])[0]
    spec = specs.resolve(settings_of(skyreels).model)
    assert spec.hub == skyreels.model.denoiser and spec.vae is not None
    assert spec.config["in_channels"] == 2 * spec.latent_channels
    for name in ("sd14_hps", "flux_hps", "hunyuan_video_vq_mq", "skyreels_i2v_mq"):
        model = load_recipe([str(RECIPES / f"{name}.yaml")])[0].model
        assert (model.dtype, model.frozen_dtype) == ("float32", "bfloat16")


def test_processes_have_hours_for_one_that_encodes_or_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    asked: list[Any] = []
    start = dist.init_process_group

    def init(backend: str, **settings: Any) -> None:
        asked.append(settings["timeout"])
        start("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)

    monkeypatch.setattr(dist, "init_process_group", init)
    try:
        Processes("no")
    finally:
        dist.destroy_process_group()
    assert asked == [PATIENCE]


@pytest.mark.release
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_under_fsdp_one_process_loads_and_all_have_the_weights(base: Base, tmp_path: Path) -> None:
    # Wan keeps some weights in float32 and has tables that are in no file; of SD3.5's, the positions are in it.
    chosen: dict[str, dict[str, Any]] = {
        "sd3": {"block_ops": "lossless", "attention": "auto", "checkpointing": "full"},
        "wan": {"dtype": "bfloat16", "lora": True},
    }
    plain: dict[str, Any] = {}
    for family, changes in chosen.items():
        recipe = make_recipe(CASES[family], base(family), tmp_path / family, micro_batch=2, **changes)
        plain[family] = load(recipe)[0].denoiser
        recipe.model.prompt_cache = str(tmp_path / "cache")
        (tmp_path / f"{family}.json").write_text(json.dumps(recipe.as_dict()))
    together([[sys.executable, str(WORKER), str(tmp_path), rank] for rank in "01"], tmp_path)
    for family, denoiser in plain.items():
        first, second = (torch.load(tmp_path / f"{family}.{rank}", weights_only=True) for rank in "01")
        assert first["empty"] == set() and second["empty"] == {name for name, _ in denoiser.named_parameters()}
        wanted = dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())
        for found in (first, second):
            assert found["tensors"].keys() == wanted.keys() and found["row"]["ratio_first_update_max_dev"] == 0.0
            for name, value in wanted.items():
                # Drawn anew in every run, and the same in its processes.
                truth = first["tensors"][name] if "lora_A" in name else value
                assert found["tensors"][name].dtype == value.dtype and torch.equal(found["tensors"][name], truth)
    assert len({value.dtype for value in plain["wan"].parameters()}) == 2
