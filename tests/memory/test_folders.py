"""Whole folders of pipelines: every part is counted, or named as missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.memory.planning import cases, folders, specs
from dancegrpo_fast.memory.planning.planner import Iteration, plan
from dancegrpo_fast.memory.planning.settings import GIB, Settings

from ..patch.models import SD3
from .pipelines import T5, TENSORS, WAN, asked, save, wan22, write

Sd3 = pytest.importorskip("diffusers").SD3Transformer2DModel
pytest.importorskip("transformers")

CLIP = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
BIG = CLIP | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 246144152\n"


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    return wan22(tmp_path / "wan")


def test_both_experts_and_the_text_encoder_are_counted(wan: Path) -> None:
    spec = specs.resolve(wan)
    assert (spec.experts, spec.boundary_ratio, spec.missing, spec.others) == (2, 0.875, (), ())
    assert [(part.name, part.parameters, part.linear) for part in spec.text_encoders] == [("text_encoder", 432, 256)]
    both, one = (Iteration(asked(wan, second_expert=name)) for name in ("trained", "left_out"))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(both.rest, name) == {key: 2 * size for key, size in getattr(one.rest, name).items()}
    frozen = Iteration(asked(wan, second_expert="frozen", offload=("expert",)))
    assert frozen.rest.weights == one.rest.weights and frozen.rest.optimizer == one.rest.optimizer
    seconds = [iteration.rollout().seconds for iteration in (frozen, one)]
    # Both are brought once for each of the twelve samples.
    rate = frozen.settings.rates.pcie_gb_s * 1e9
    assert seconds[0] - seconds[1] == pytest.approx(2 * 12 * sum(one.rest.weights.values()) / rate)
    waits = Iteration(asked(wan, offload=("expert",)))
    assert waits.rest.weights == one.rest.weights and waits.rest.optimizer == both.rest.optimizer


def test_the_plan_says_what_is_in_it(wan: Path) -> None:
    found = plan(asked(wan), advise=False)
    assert found.phases[0].name == "text encoding" and found.phases[0].bytes == 2 * 432
    text = found.table()
    assert "two denoisers take turns, the second below 0.875 of the noise: both on the device" in text
    assert "encoders, GiB in bfloat16: text_encoder" in text


def test_a_folder_without_an_index_says_what_is_missing(tmp_path: Path) -> None:
    folder = write(tmp_path, None, transformer=WAN)
    spec = specs.resolve(folder)
    assert spec.text_encoders == () and spec.vae is None
    assert spec.missing == (
        f"text encoders and whatever else the pipeline has: there is no model_index.json in {folder}",
    )


def test_parts_that_cannot_be_counted_are_named(wan: Path) -> None:
    index = json.loads((wan / folders.INDEX).read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "text_encoder_2": ["transformers", "NoSuchModel"],
        "motion_adapter": ["diffusers", "MotionAdapter"],
    }
    write(wan, index, text_encoder_2=T5)
    save(write(wan, index, motion_adapter={}) / "motion_adapter" / "diffusion_pytorch_model.safetensors", TENSORS)
    spec = specs.resolve(wan)
    named = dict(line.split(" ", 1) for line in spec.missing)
    assert list(named) == ["image_encoder", "safety_checker", "text_encoder_2"]
    assert named["safety_checker"] == "(StableDiffusionSafetyChecker): no training loads it"
    assert "neither whole safetensors files nor a config.json" in named["image_encoder"]
    assert "cannot be made of its config.json (AttributeError" in named["text_encoder_2"]
    assert [(part.name, part.parameters) for part in spec.others] == [("motion_adapter", 432)]


def test_a_clone_without_weights_is_counted_by_its_configurations(tmp_path: Path) -> None:
    """Stable Diffusion XL's, whose weights are git-lfs pointers there."""
    index = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    unet = json.loads((specs.CONFIGS / "sdxl.json").read_text())["denoiser"]
    folder = write(tmp_path, index, unet=unet, text_encoder=CLIP, text_encoder_2=BIG | {"projection_dim": 1280})
    for name in ("text_encoder", "text_encoder_2"):
        (folder / name / "model.safetensors").write_text(POINTER)
    shipped = [(part.parameters, part.linear) for part in specs.resolve("sdxl").text_encoders]
    assert [(part.parameters, part.linear) for part in specs.resolve(folder).text_encoders] == shipped


def test_shards_and_variants_are_counted_once(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        save(tmp_path / f"{name}.safetensors", {f"{name}.weight": (4, 4)})
    save(tmp_path / "model.fp16.safetensors", TENSORS)
    assert folders.stored(tmp_path) == (32, 32, 0)
    # A shard lacks, and the other variant is whole.
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert folders.stored(tmp_path) == (432, 256, 0)


def test_quantised_files_are_not_taken_for_plain_ones(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"q.weight": (128, 1)}, torch.uint8)
    assert folders.stored(tmp_path) is None


def test_bytes_of_quantised_encoders() -> None:
    part = specs.resolve("wan22-a14b").text_encoders[0]
    rest = part.parameters - part.linear
    assert part.bytes("bfloat16") == 2 * part.parameters and part.bytes("float32") == 4 * part.parameters
    assert part.bytes("bfloat16", "nf4") == part.linear * 9 // 16 + 2 * rest
    assert part.bytes("bfloat16", "int8") == part.bytes("bfloat16", "fp8") == part.linear + 2 * rest
    # A14B's, as its folder has it.
    assert part.bytes("bfloat16") / GIB == pytest.approx(10.58, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_t5_has_the_bytes_that_transformers_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    """In float16 a part of it stays in float32."""
    import transformers

    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    found = folders.part(tmp_path, "transformers", "T5EncoderModel")
    assert isinstance(found, folders.Part) and found.wide == 2 * 8 * 16
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
    assert found.bytes(str(dtype).removeprefix("torch.")) == sum(p.nbytes for p in loaded.parameters())


def test_a_name_on_the_hub_is_read_as_a_folder(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache of the hub's layout, without a network."""
    from huggingface_hub import constants

    there = tmp_path / "cache" / "models--some--wan"
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "main").write_text("abc")
    (there / "snapshots").mkdir()
    wan.rename(there / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = specs.resolve("some/wan")
    assert (spec.name, spec.experts, spec.compression) == ("some/wan", 2, (4, 8, 8))
    assert sum(part.parameters for part in spec.text_encoders) == 432
    with pytest.raises(ValueError, match=r'model: got "some/other", want .*a name on the hub that can be reached'):
        specs.resolve("some/other")


def test_only_models_of_two_denoisers_have_a_second() -> None:
    for more in ({"second_expert": "frozen"}, {"offload": ("expert",)}):
        with pytest.raises(ValueError, match=r'got ".*" for wan22-5b, which has one denoiser'):
            Iteration(Settings("wan22-5b", 5, 64, 64, lora=2, **more))
    with pytest.raises(ValueError, match="offload: got expert with fsdp 8"):
        Settings("wan22-a14b", fsdp=8, offload=("expert",))
    swapped: dict[str, Any] = {"lora": 8, "blocks_to_swap": 4}
    for more in (swapped, {"lora": 8, "quantization": "nf4"}, {"lora": 0}):
        with pytest.raises(ValueError, match="offload: got expert with"):
            Settings("wan22-a14b", offload=("expert",), **more)


def test_kinds_are_found_by_their_parameters(wan: Path) -> None:
    assert cases.kinds_of(specs.resolve(wan)) == (cases.Kind("blocks", 0, 3, 1),)
    medium = cases.kinds_of(specs.resolve("sd35-medium"))
    assert medium == (cases.Kind("transformer_blocks", 0, 13, 1), cases.Kind("transformer_blocks", 13, 11, 2))
    assert cases.kinds_of(specs.resolve("sdxl")) == ()


def test_a_kind_of_one_block_is_not_the_last_of_another(tmp_path: Path) -> None:
    """Of blocks with two attentions, with one, and without text behind it the last is of the second kind."""
    Sd3(**SD3 | {"num_layers": 4}, qk_norm="rms_norm", dual_attention_layers=(0, 1)).save_config(
        tmp_path / "transformer"
    )
    wanted = (cases.Kind("transformer_blocks", 0, 2, 1), cases.Kind("transformer_blocks", 2, 2, 2))
    assert cases.kinds_of(specs.resolve(str(tmp_path))) == wanted
