"""What a family makes of its settings: sizes, schedules, lengths of text, tiles, and what it refuses."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch

from dancegrpo_fast import transitions
from dancegrpo_fast.models import family_of, load_model
from dancegrpo_fast.models.base import find_folder, guided_batch, split_guided
from dancegrpo_fast.models.grids import packed, to_frames, unpacked
from dancegrpo_fast.prompts import Prompt, load_prompts
from dancegrpo_fast.recipe import ModelSettings

from .cases import CASES, NEGATIVE, PROMPTS, load, make_recipe
from .checks import CPU
from .folders import diffusers, save_flux, save_skyreels, save_wan

Base = Callable[[str], Path]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("hunyuan_video", {"frames": 6}, r"sampler.frames: got 6, want 4 n \+ 1, the nearest are 5 and 9"),
        ("hunyuan_video", {"height": 24}, r"sampler: got height 24, width 32, want multiples of 16"),
        ("flux", {"width": 18}, r"sampler: got height 16, width 18, want multiples of 4"),
        ("flux", {"frames": 5}, r"sampler.frames: got 5, want 1 for an image model"),
        ("stable_diffusion", {"width": 18}, r"sampler: got height 16, width 18, want multiples of 4"),
        ("wan", {"frames": 4}, r"sampler.frames: got 4, want 2 n \+ 1"),
        ("wan", {"width": 10}, "sampler: got height 16, width 10, want multiples of 4"),
        ("stable_diffusion", {"max_text_tokens": 9}, r"model.max_text_tokens: got 9, want null"),
    ],
)
def test_sizes_that_cannot_be_made(
    base: Base, tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(make_recipe(CASES[family], base(family), tmp_path / "run", **changes))


@pytest.mark.parametrize("family", ["flux", "hunyuan_video"])
def test_a_shift_replaces_the_pipelines_schedule(base: Base, tmp_path: Path, family: str) -> None:
    recipe = make_recipe(CASES[family], base(family), tmp_path / "run", shift=5.0)
    model, _ = load(recipe)
    table = model.table(recipe.sampler)
    assert torch.equal(table.times, transitions.shifted_sigmas(3, 5.0)[:-1])
    assert model.table(recipe.sampler, deterministic=True).is_deterministic


def test_the_shift_of_a_multistep_scheduler_is_taken(tmp_path: Path) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    recipe = make_recipe(CASES["wan"], save_wan(tmp_path / "base", scheduler), tmp_path / "run")
    assert torch.equal(load(recipe)[0].table(recipe.sampler).times, transitions.shifted_sigmas(3, 5.0)[:-1])


def test_a_wan_of_two_transformers_is_refused(tmp_path: Path) -> None:
    folder = save_wan(tmp_path / "base", boundary_ratio=0.9)
    with pytest.raises(ValueError, match="a Wan of two transformers, want one of one"):
        load(make_recipe(CASES["wan"], folder, tmp_path / "run"))


def test_guidance_that_a_model_cannot_have(tmp_path: Path) -> None:
    folder = save_flux(tmp_path / "base", guidance_embeds=False)
    model, _ = load(make_recipe(CASES["flux"], folder, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"sampler.guidance_scale: got 3.5, want 1 for a FLUX without"):
        model.unconditional(3.5)
    assert model.unconditional(1.0) is None


def test_text_is_cut_after_the_longest_prompt_of_the_run(base: Base, tmp_path: Path) -> None:
    case = CASES["skyreels_i2v"]
    recipe = make_recipe(case, base("skyreels_i2v"), tmp_path / "run")
    model, prompts = load(recipe)
    # Four tokens of the template before a prompt and three after it.
    longest = 7 + max(len(text.split()) for text in PROMPTS)
    masks = model.encode(prompts)["prompt_mask"]
    assert masks.sum(dim=1).tolist() == [7 + len(text.split()) for text in PROMPTS]
    assert model.encode(prompts[:1])["prompt_embeds"].shape[1] == masks.shape[1] == longest
    assert model.unconditional(5.0)["prompt_mask"].sum().item() == 7 + len(NEGATIVE.split())
    # The negative prompt counts too.
    recipe = make_recipe(case, base("skyreels_i2v"), tmp_path / "run", negative_prompt=" ".join("abcdefghi"))
    model, prompts = load(recipe)
    assert model.encode(prompts)["prompt_mask"].shape[1] == 7 + 9


def test_qwen_images_text_is_as_long_as_the_longest_prompt_of_the_run(base: Base, tmp_path: Path) -> None:
    unguided: dict[str, Any] = {"guidance_scale": 1.0, "max_text_tokens": None}
    recipe = make_recipe(CASES["qwen_image"], base("qwen_image"), tmp_path / "run", **unguided)
    short, longer = Prompt("b", {}), Prompt("a red fox", {})
    both = load_model(recipe, CPU, [short, longer])
    lengths = [both.encode([prompt])["prompt_embeds"].shape[1] for prompt in (short, longer)]
    used = [int(both.encode([prompt])["prompt_embeds_mask"].sum()) for prompt in (short, longer)]
    assert lengths == [used[1]] * 2 and used[1] - used[0] == len("a red fox") - len("b")
    embeds = load_model(recipe, CPU, [short]).encode([short])["prompt_embeds"]
    assert torch.equal(both.encode([short])["prompt_embeds"][:, : used[0]], embeds)


def test_tiles(base: Base, tmp_path: Path) -> None:
    folder = base("hunyuan_video")

    def made(**changes: Any) -> Any:
        return load(make_recipe(CASES["hunyuan_video"], folder, tmp_path / "run", **changes))[0]

    assert made().tile is None
    tiled = made(vae_tiling="on", height=64, width=64)
    # Its own tile is larger than the picture: half of that.
    assert tiled.tile == 32 and (tiled.vae.tile_sample_min_height, tiled.vae.tile_sample_stride_width) == (32, 24)
    tiled.tile_vae(None)
    assert tiled.tile is None
    with pytest.raises(ValueError, match=r'model.vae_tiling: got "on" for pictures of 32 pixels, want larger'):
        made(vae_tiling="on")
    with pytest.raises(
        ValueError, match=r"model.vae_tile: got 48, want a multiple of 32 for AutoencoderKLHunyuanVideo"
    ):
        made(vae_tiling="on", vae_tile=48, height=64, width=64)


def test_frames_are_on_the_8_bit_grid() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.3, 1.0, 7.0])
    wanted = torch.tensor([0, 0, 128, 166, 255, 255]) / 255
    image = pixels.view(1, 1, 2, 3).expand(2, 3, 2, 3)
    assert torch.equal(to_frames(image), wanted.view(1, 1, 1, 2, 3).expand(2, 1, 3, 2, 3))
    video = pixels.view(1, 1, 6, 1, 1).expand(2, 3, 6, 1, 1)
    assert torch.equal(to_frames(video), wanted.view(1, 6, 1, 1, 1).expand(2, 6, 3, 1, 1))


def test_packing_is_undone() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = packed(latents)
    assert tokens.shape == (2, 6, 12) and torch.equal(unpacked(tokens, (2, 3)), latents)
    # Two by two, channel by channel; tokens row by row.
    assert tokens[0, 1, :4].tolist() == latents[0, 0, :2, 2:4].flatten().tolist()


def test_guided_batches_are_the_prompts_then_the_negative_prompt() -> None:
    latents, times = torch.arange(2.0)[:, None], torch.tensor([5.0, 6.0])
    conditioning = {"text": torch.tensor([[1.0], [2.0]]), "image": torch.tensor([[3.0], [4.0]])}
    both, twice, text = guided_batch(latents, times, conditioning, {"text": torch.tensor([[9.0]])})
    assert both.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
    assert twice.tolist() == [5.0, 6.0, 5.0, 6.0]
    assert text["text"].flatten().tolist() == [1.0, 2.0, 9.0, 9.0]
    assert text["image"].flatten().tolist() == [3.0, 4.0, 3.0, 4.0]
    own = conditioning | {"negative_text": torch.tensor([[7.0], [8.0]])}
    _, _, text_of_each = guided_batch(latents, times, own, {})
    assert text_of_each.keys() == conditioning.keys()
    assert text_of_each["text"].flatten().tolist() == [1.0, 2.0, 7.0, 8.0]
    assert text_of_each["image"].flatten().tolist() == [3.0, 4.0, 3.0, 4.0]
    assert guided_batch(latents, times, own, None) == (latents, times, own)
    output, uncond = split_guided(text["text"], {})
    assert uncond is not None
    assert (output.flatten().tolist(), uncond.flatten().tolist()) == ([1.0, 2.0], [9.0, 9.0])
    assert split_guided(latents, None) == (latents, None)


def test_images_of_prompts_are_paths_beside_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "image": "frames/a.png"}, {"prompt": "b", "image": "/b.png"}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metas = [prompt.meta for prompt in load_prompts(tmp_path / "p.jsonl")]
    assert metas == [{"image": str(tmp_path.resolve() / "frames" / "a.png")}, {"image": "/b.png"}, {}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r'prompts: got "a" with image None, want an `image` column with a path'),
        ({"prompt": "a", "image": "gone.png"}, r"prompts: got the image .*gone\.png, want a picture that can be read"),
        ({"prompt": "a", "image": "text.png"}, r"prompts: got the image .*text\.png, want a picture that can be read"),
    ],
)
def test_first_frames_that_are_not_there(base: Base, tmp_path: Path, row: dict[str, str], message: str) -> None:
    recipe = make_recipe(CASES["skyreels_i2v"], base("skyreels_i2v"), tmp_path / "run")
    (tmp_path / "text.png").write_text("not a picture")
    Path(recipe.prompts).write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        load(recipe)


def test_a_picture_cut_short_is_refused_before_anything_is_loaded(base: Base, tmp_path: Path) -> None:
    recipe = make_recipe(CASES["skyreels_i2v"], base("skyreels_i2v"), tmp_path / "run", path=str(tmp_path / "no_model"))
    picture = tmp_path / "2.png"
    picture.write_bytes(picture.read_bytes()[:200])
    # Of every row, whichever a run comes to.
    prompts = load_prompts(recipe.prompts)
    with pytest.raises(ValueError, match=r"prompts: got the image .*2\.png, want a picture that can be read"):
        load_model(recipe, CPU, prompts, reached=prompts[:1])


def test_a_denoiser_without_channels_for_a_first_frame(tmp_path: Path) -> None:
    folder = save_skyreels(tmp_path / "base", in_channels=4)
    with pytest.raises(ValueError, match=r"model.path: got a denoiser of 4 input channels, want 8"):
        load(make_recipe(CASES["skyreels_i2v"], folder, tmp_path / "run"))


def test_a_folder_without_a_part(base: Base, tmp_path: Path) -> None:
    shutil.copytree(base("flux"), tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "transformer")
    with pytest.raises(ValueError, match=r"model.path: got .*, want transformer/ in it for the family flux"):
        load(make_recipe(CASES["flux"], tmp_path / "base", tmp_path / "run"))


def test_a_file_for_a_folder_is_refused_with_what_makes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that is told is run, but for the reading; a family whose pipeline reads no files says so."""
    file = tmp_path / "it's v1.ckpt"
    file.touch()
    for family, word in (
        ("stable_diffusion", "once: python -c"),
        ("hunyuan_video", "of no single file of this family"),
    ):
        with pytest.raises(ValueError, match=r"model.path: got the file .*, want a diffusers folder, ") as refused:
            family_of(ModelSettings(family, str(file)))
        assert word in str(refused.value)
    with pytest.raises(ValueError, match="once") as refused:
        family_of(ModelSettings("sd3", str(file)))
    python, option, code = shlex.split(str(refused.value).partition("once: ")[2])
    made = Mock()
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_single_file", made)
    exec(code, {})
    assert (python, option, made.mock_calls) == ("python", "-c", [call(str(file)), call().save_pretrained("FOLDER")])


def test_paths_and_names_on_the_hub(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flux = base("flux")
    assert find_folder(str(flux)) == flux
    for path in (str(tmp_path), str(tmp_path / "none"), "name", "./a/b"):
        with pytest.raises(ValueError, match=r"model.path: got .*, want a diffusers folder .* or a hub name"):
            find_folder(path)
    asked: list[tuple[str, set[str]]] = []

    def download(name: str, **parts: None) -> str:
        asked.append((name, set(parts)))
        return str(flux)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert find_folder("owner/model") == flux
    assert asked == [("owner/model", {"safety_checker", "feature_extractor", "image_encoder", "image_processor"})]

    def unreachable(name: str, **parts: None) -> str:
        raise OSError("no network")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", unreachable)
    with pytest.raises(ValueError, match=r"model.path: got owner/model, want .* can be reached \(no network\)"):
        find_folder("owner/model")
