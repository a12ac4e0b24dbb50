import dataclasses
import json
from typing import Any

import pytest
import torch

from dancegrpo_fast.memory.planning import cases, folders, specs
from dancegrpo_fast.memory.planning.settings import GIB, Settings
from dancegrpo_fast.memory.trace.tracer import trace

from ..release import release_but
from ..tolerances import assert_as_printed

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# Parameters in billions or all of them, as published; frames, height, width, and the shape of the denoiser's output.
MODELS = {
    "sd14": ("0.86", (1, 512, 512), (2, 4, 64, 64)),
    # The size of the file of its float32 weights, less the header's.
    "sdxl": ("2.567463684", (1, 1024, 1024), (2, 4, 128, 128)),
    "flux-dev": ("11.9", (1, 720, 720), (2, 2025, 64)),
    "flux2-dev": ("32.223281152", (1, 512, 768), (2, 1536, 128)),
    "chroma": ("8.9", (1, 512, 768), (2, 1536, 64)),
    "z-image": ("6.154908736", (1, 512, 768), (16, 1, 64, 96)),
    "hunyuan-video": ("12.8", (53, 480, 640), (2, 16, 14, 60, 80)),
    "hunyuan-video-15": ("8.326608160", (5, 480, 832), (2, 32, 2, 30, 52)),
    "skyreels-i2v": ("12.8", (5, 544, 960), (2, 16, 2, 68, 120)),
    "sd35-medium": ("2.24", (1, 512, 768), (2, 16, 64, 96)),
    "sd35-large": ("8.06", (1, 1024, 1024), (2, 16, 128, 128)),
    "qwen-image": ("20.4", (1, 512, 768), (2, 1536, 64)),
    "wan21-1.3b": ("1.42", (81, 480, 832), (2, 16, 21, 60, 104)),
    "wan21-14b": ("14.3", (1, 480, 832), (2, 16, 1, 60, 104)),
    # Of each expert.
    "wan22-a14b": ("14.288491584", (5, 480, 832), (2, 16, 2, 60, 104)),
    "wan22-5b": ("4.999787712", (5, 704, 1280), (2, 48, 2, 44, 80)),
    "ltx-video": ("1.923385472", (49, 512, 704), (2, 2464, 128)),
    "ltx-2": ("18.876174592", (49, 512, 704), (2, 2464, 128)),
    "cogvideox-2b": ("1.7", (9, 480, 720), (2, 3, 16, 60, 90)),
    "cogvideox-5b": ("5.570283072", (9, 480, 720), (2, 3, 16, 60, 90)),
}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_shipped_models_are_those_listed() -> None:
    assert specs.names() == sorted(MODELS)


@pytest.mark.parametrize("name", release_but(("flux-dev", "hunyuan-video", "sd14"), MODELS))
def test_parameters_are_as_many_as_published(name: str) -> None:
    spec = specs.resolve(name)
    model = specs.build(spec)
    assert_as_printed(count(model) / 1e9, MODELS[name][0])
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert all(p.requires_grad for p in model.parameters())
    vae = specs.build_vae(spec)
    assert not any(p.requires_grad for p in vae.parameters())


@pytest.mark.parametrize("name", release_but(("flux-dev", "hunyuan-video-15"), MODELS))
def test_inputs_are_what_the_model_takes(name: str) -> None:
    _, size, shape = MODELS[name]
    spec = specs.resolve(name)
    fewer = {key: 2 for key in ("num_layers", "num_single_layers", "n_layers") if key in spec.config}
    spec = dataclasses.replace(spec, config=spec.config | fewer)
    seen = []

    def call(**inputs: Any) -> Any:
        found = model(**inputs)[0]
        # Z-Image has a list, a picture a sample.
        seen.append((found[0] if isinstance(found, list) else found).shape)
        return seen

    model = specs.build(spec)
    trace(model, specs.inputs(spec, *size, batch=2), train=False, call=call)
    assert seen == [shape]


@pytest.mark.release
@pytest.mark.usefixtures("collected_once")
def test_hunyuan_video_at_full_size() -> None:
    """Against figures that were found by other means."""
    spec = specs.resolve("hunyuan-video")
    found = trace(specs.build(spec), specs.inputs(spec, 53, 480, 640), optimizer="fused")
    assert_as_printed(found.kept_bytes / GIB, "157")
    assert_as_printed(found.peak.bytes / GIB, "253")


def test_wan_keeps_in_float32_what_diffusers_keeps() -> None:
    spec = specs.resolve("wan21-1.3b")
    model = specs.build(spec, torch.bfloat16)
    single = {
        name.split(".")[-1] if "table" in name else name.split(".")[-2]
        for name, p in model.named_parameters()
        if p.dtype == torch.float32
    }
    assert single == {"scale_shift_table", "norm2", "linear_1", "linear_2"}
    assert model.patch_embedding.weight.dtype == torch.bfloat16


def test_positions_of_sd35_are_loaded_in_the_models_dtype() -> None:
    model = specs.build(specs.resolve("sd35-medium"))
    table = model.pos_embed.pos_embed
    assert table.dtype == torch.bfloat16 and table.shape == (1, 384 * 384, 1536)


def sizes(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, inner, layers, heads), strict=True))


def ltx2_connectors() -> torch.nn.Module:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    both = {"num_attention_heads": 30, "attention_head_dim": 128, "num_layers": 2, "num_learnable_registers": 128}
    sides = {f"{side}_connector_{key}": value for side in ("video", "audio") for key, value in both.items()}
    found: torch.nn.Module = LTX2TextConnectors(
        caption_channels=3840,
        text_proj_in_factor=49,
        video_gated_attn=False,
        audio_gated_attn=False,
        connector_rope_base_seq_len=4096,
        rope_theta=10000.0,
        rope_double_precision=True,
        causal_temporal_positioning=False,
        rope_type="split",
        **sides,
    )
    return found


def test_text_encoders_have_the_parameters_stated() -> None:
    t5 = {
        "d_model": 4096,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "d_kv": 64,
        "feed_forward_proj": "gated-gelu",
    }
    byt5 = {"d_model": 1472, "d_ff": 3584, "num_layers": 12, "num_heads": 6, "d_kv": 64, "vocab_size": 1510}
    qwen = transformers.Qwen2_5_VLConfig(
        text_config=sizes(3584, 18944, 28, 28) | {"num_key_value_heads": 4, "vocab_size": 152064},
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
        | {"out_hidden_size": 3584},
    )
    qwen3 = transformers.Qwen3Config(
        **sizes(2560, 9728, 36, 32), num_key_value_heads=8, head_dim=128, vocab_size=151936
    )
    llama = transformers.LlamaConfig(**sizes(4096, 14336, 32, 32), num_key_value_heads=8, vocab_size=128320)
    mistral = transformers.Mistral3Config(
        text_config=sizes(5120, 32768, 40, 32)
        | {"model_type": "mistral", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072},
        vision_config=sizes(1024, 4096, 24, 16)
        | {"model_type": "pixtral", "image_size": 1540, "patch_size": 14, "head_dim": 64},
        multimodal_projector_bias=False,
        tie_word_embeddings=False,
    )
    gemma = transformers.Gemma3Config(
        text_config=sizes(3840, 15360, 48, 16) | {"num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208},
        vision_config=sizes(1152, 4304, 27, 16) | {"image_size": 896, "patch_size": 14, "vision_use_head": False},
    )
    large = transformers.CLIPTextConfig(**sizes(768, 3072, 12, 12), projection_dim=768)
    big = transformers.CLIPTextConfig(**sizes(1280, 5120, 32, 20), projection_dim=1280)
    with torch.device("meta"):
        built = {
            "google/t5-v1_1-xxl": transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **t5)),
            "google/umt5-xxl": transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=256384, **t5)),
            "google/byt5-small": transformers.T5EncoderModel(transformers.T5Config(**(t5 | byt5))),
            "CLIPTextModel with": transformers.CLIPTextModel(large),
            "Projection with the configuration of openai": transformers.CLIPTextModelWithProjection(large),
            "bigG": transformers.CLIPTextModelWithProjection(big),
            "LlamaModel": transformers.LlamaModel(llama),
            "Qwen2_5_VLForConditionalGeneration": transformers.Qwen2_5_VLForConditionalGeneration(qwen),
            "Qwen3Model": transformers.Qwen3Model(qwen3),
            "Mistral3": transformers.Mistral3ForConditionalGeneration(mistral),
            "Gemma3": transformers.Gemma3ForConditionalGeneration(gemma),
            "LTX2TextConnectors": ltx2_connectors(),
        }
    built["Qwen2_5_VLTextModel"] = built["Qwen2_5_VLForConditionalGeneration"].model.language_model
    for name in specs.names():
        encoders = specs.resolve(name).text_encoders
        assert encoders
        for encoder in encoders:
            [wanted] = [model for key, model in built.items() if key in encoder.source]
            assert (encoder.parameters, encoder.linear, encoder.wide) == folders.counted(wanted), encoder


def test_local_folder_and_its_vae_are_read(tmp_path: Any) -> None:
    settings = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    model = diffusers.FluxTransformer2DModel(
        axes_dims_rope=(4, 6, 6), in_channels=16, joint_attention_dim=24, **settings
    )
    model.save_config(tmp_path / "transformer")
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "latent_channels": 4}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae))
    spec = specs.resolve(tmp_path)
    assert (spec.denoiser, spec.vae, spec.latent_channels) == ("FluxTransformer2DModel", "AutoencoderKL", 4)
    assert spec.compression == (1, 2, 2) and specs.tokens(spec, 1, 16, 32) == 32
    assert count(specs.build(spec)) == count(model)


def test_bad_models_are_refused(tmp_path: Any, monkeypatch: Any) -> None:
    with pytest.raises(
        ValueError, match=r'model: got "flux", want one of chroma, .*, flux-dev, .*, a diffusers folder'
    ):
        specs.resolve("flux")
    with pytest.raises(ValueError, match=r"model: got the folder .*, want transformer/config.json"):
        specs.resolve(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet1DModel"}))
    with pytest.raises(ValueError, match=r'model: got a "UNet1DModel" in .*, want UNet2DConditionModel'):
        specs.resolve(tmp_path)

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r'model: got "some/model".*can be reached \(OSError: no network\)'):
        specs.resolve("some/model")


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("hunyuan-video", (52, 480, 640), "frames: got 52, want 4 n \\+ 1 for hunyuan-video"),
        ("hunyuan-video", (0, 480, 640), "frames: got 0"),
        ("flux-dev", (5, 512, 512), "frames: got 5, want 1 for the image model flux-dev"),
        ("hunyuan-video", (53, 488, 640), "height: got 488, want a multiple of 16"),
        ("sd14", (1, 512, 500), "width: got 500, want a multiple of 8"),
        ("wan22-5b", (5, 720, 1280), "height: got 720, want a multiple of 32"),
        ("ltx-video", (48, 512, 704), "frames: got 48, want 8 n"),
    ],
)
def test_sizes_the_model_cannot_have_are_refused(name: str, sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs.inputs(specs.resolve(name), *sizes)


def test_empty_batches_and_texts_are_refused() -> None:
    spec = specs.resolve("sd14")
    with pytest.raises(ValueError, match="batch: got 0, want at least 1"):
        specs.inputs(spec, 1, 512, 512, batch=0)
    with pytest.raises(ValueError, match="text_tokens: got 0, want at least 1"):
        specs.inputs(spec, 1, 512, 512, text_tokens=0)


@pytest.mark.parametrize(
    ("model", "by_batch"),
    [
        *[("sd14", True), ("flux-dev", False), ("hunyuan-video", False), ("skyreels-i2v", True), ("wan21-1.3b", True)],
        *[("flux2-dev", False), ("chroma", True), ("hunyuan-video-15", True)],
    ],
)
def test_who_guides_by_a_second_row(model: str, by_batch: bool) -> None:
    assert specs.resolve(model).guides_by_batch is by_batch
    frames = 5 if specs.resolve(model).is_video else 1
    assert cases.rows_of(Settings(model, frames, 256, 256, guidance_scale=5.0), 3) == (6 if by_batch else 3)
    assert cases.rows_of(Settings(model, frames, 256, 256, guidance_scale=1.0), 3) == 3
