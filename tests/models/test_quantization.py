"""Frozen weights in fewer bits: bitsandbytes' on its CPU kernels, which diffusers lets nobody use, and float8."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dancegrpo_fast.memory.planning import folders
from dancegrpo_fast.memory.planning.blocks import compose
from dancegrpo_fast.memory.planning.quantised import quantised
from dancegrpo_fast.models import family_of, load_model
from dancegrpo_fast.models.base import DiffusersModel
from dancegrpo_fast.models.loading import load_encoders, load_parts
from dancegrpo_fast.models.planning import settings_of
from dancegrpo_fast.models.qwen_image_edit import picture_processor
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.recipe import ModelSettings, load_recipe
from dancegrpo_fast.train.loop import Trainer

from ..memory.small import case_of
from ..release import release_but
from ..train.tiny import LoraSettings, make_recipe
from . import checks
from .cases import CASES, load
from .cases import make_recipe as recipe_of_family

diffusers = pytest.importorskip("diffusers")

KINDS = ("nf4", "int8", "fp8")
LORA = LoraSettings(rank=2, alpha=2)
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "lora": LORA}


@pytest.fixture
def without_gpu() -> Iterator[None]:
    """Takes diffusers' check for a GPU away, and a layout of bitsandbytes that only CPUs use."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    with pytest.MonkeyPatch.context() as patch:
        for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            patch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
        patch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)
        yield


def loaded(flux: Path, folder: Path, kind: str) -> Any:
    recipe = make_recipe(flux, folder / "run", quantization=kind, **OPTIONS)
    return load_model(recipe, checks.CPU, [Prompt("red", {})]).denoiser


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_stored_as_the_planner_counts_them(flux: Path, tmp_path: Path, kind: str) -> None:
    denoiser = loaded(flux, tmp_path, kind)
    expected = {"nf4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    assert denoiser.transformer_blocks[0].attn.to_q.base_layer.weight.dtype == expected
    assert {p.dtype for p in denoiser.parameters() if p.requires_grad} == {torch.float32}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(denoiser)}
    assert sum(held.values()) == quantised(case_of(flux, lora=2, kernel="cpu"), kind).stored


def _tensors(denoiser: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, and what bitsandbytes keeps beside them."""
    for parameter in denoiser.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        yield from (state.absmax, state.code) if state is not None else ()
        scale = getattr(parameter, "SCB", None)
        yield from () if scale is None else (scale,)


CHANGES: list[dict[str, Any]] = [
    {"micro_batch": 1},
    {"micro_batch": 4, "checkpointing": "full", "block_ops": "lossless"},
]


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", release_but(CHANGES[1:], CHANGES), ids=str)
def test_training_has_ratio_one(flux: Path, tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    checks.train(flux, tmp_path / "run", quantization=kind, **OPTIONS, **changes)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("kind", release_but(("nf4",), KINDS))
def test_resume_and_policies_change_no_bit(flux: Path, tmp_path: Path, kind: str) -> None:
    options = OPTIONS | {"quantization": kind, "micro_batch": 4}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    checks.train(flux, whole, **options)
    Trainer(checks.small_recipe(flux, parts, **options | {"iterations": 1})).run()
    Trainer(checks.small_recipe(flux, parts, **options), resume="auto").run()
    checks.assert_same_weights(whole, parts)
    for policy in ("full", "attention"):
        checks.train(flux, tmp_path / policy, checkpointing=policy, **options)
        checks.assert_same_weights(whole, tmp_path / policy)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(flux: Path, tmp_path: Path, kind: str) -> None:
    layer = loaded(flux, tmp_path, kind).x_embedder
    rows = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    # What LLM.int8 would take for an outlier, in one row only.
    rows[0, 0] = 50.0
    together = layer(rows)
    rows[0, 0] = 0.0
    assert torch.equal(layer(rows)[1:], together[1:])


@pytest.mark.release
@pytest.mark.usefixtures("without_gpu")
def test_the_recipe_for_a_small_card(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tiny model in it, and a card that is as tight for that."""
    file = Path(__file__).parents[2] / "recipes" / "flux_lora_hps_16gib.yaml"
    recipe, _ = load_recipe([str(file)])
    tiny = make_recipe(flux, tmp_path / "run", iterations=2, learning_rate=recipe.train.learning_rate)
    model = replace(recipe.model, path=str(flux), prompt_cache=str(tmp_path / "cache"), memory_gib=1.0)
    train = replace(tiny.train, micro_batch=1, offload=recipe.train.offload)
    tiny = replace(tiny, model=model, train=train)
    plain = replace(
        tiny,
        model=replace(model, checkpointing="none", block_ops="off", attention=None, vae_tiling="off"),
        train=replace(train, offload=[]),
        output_dir=str(tmp_path / "plain"),
    )
    Trainer(plain).run()
    asked = checks.pieces(tiny, cast(DiffusersModel, load_model(tiny, checks.CPU, [Prompt("red", {})])))
    full = asked.training(compose(asked.replay, "full", host_inputs=True))
    tight = checks.least_gib(asked, max(phase.bytes for phase in full) + 1)
    capsys.readouterr()
    Trainer(replace(tiny, model=replace(model, memory_gib=tight))).run()
    said = capsys.readouterr().out
    assert "checkpointing" in said and "checkpointing none" not in said and "ratio dev 0.0e+00" in said
    checks.assert_same_weights(tmp_path / "run", tmp_path / "plain")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_wants_a_gpu(flux: Path, tmp_path: Path, kind: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=rf'model.quantization: got "{kind}" on cpu, .*GPU'):
        loaded(flux, tmp_path, kind)


def test_weights_in_fewer_bits_are_for_lora_on_bfloat16() -> None:
    with pytest.raises(ValueError, match=r'model.quantization: got "nf4" without model.lora, want both'):
        ModelSettings("flux", "folder", "bfloat16", quantization="nf4")
    with pytest.raises(ValueError, match=r'model.quantization: got "fp8" with float32, want bfloat16'):
        ModelSettings("flux", "folder", lora=LoraSettings(), quantization="fp8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", dict.fromkeys(case.family for case in CASES.values()))
def test_text_encoders_are_stored_as_the_planner_counts_them(
    base: Callable[[str], Path], tmp_path: Path, family: str, kind: str
) -> None:
    if kind != "fp8":
        pytest.importorskip("bitsandbytes")
    folder = base(family)
    cls = family_of(ModelSettings(family, str(folder)))
    given = {"processor": picture_processor(folder / "processor")} if "processor" in cls.text_parts else {}
    make = partial(load_parts, getattr(diffusers, cls.pipeline), folder, cls.text_parts, torch.bfloat16, **given)
    names = [part for part in cls.text_parts if part.startswith("text_encoder")]
    pipeline = load_encoders(make, names, torch.bfloat16, kind, torch.device("cpu"))
    stored = {"nf4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    for name, value in pipeline.load_config(folder).items():
        if name.startswith("text_encoder"):
            counted = folders.part(folder / name, *value)
            narrow = [p for p in getattr(pipeline, name).parameters() if p.dtype == stored and p.ndim == 2]
            # Two weights of nf4 are a byte.
            assert sum(p.numel() * (2 if kind == "nf4" else 1) for p in narrow) == counted.linear > 0


# Encoders of each kind: CLIP's and T5's, Qwen's with pictures, and all of SD3's in float32.
ENCODED = ("flux bfloat16", "qwen_image_edit bfloat16", "sd3 float32")


@pytest.mark.parametrize("case", release_but(ENCODED[:1], [*(f"{family} bfloat16" for family in CASES), ENCODED[-1]]))
def test_text_in_fewer_bits_is_further_from_what_it_was(base: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    pytest.importorskip("bitsandbytes")
    family, dtype = case.split()
    found = {}
    for kind in (None, "int8", "fp8", "nf4"):
        changes = {"prompt_cache": str(tmp_path / "cache"), "frozen_dtype": dtype, "text_encoder_quantization": kind}
        model, prompts = load(recipe_of_family(CASES[family], base(family), tmp_path / "run", **changes))
        rows = model.encode(prompts)
        found[kind] = torch.cat([value.flatten() for name, value in rows.items() if name.endswith("embeds")])
    assert len(list((tmp_path / "cache").iterdir())) == 4
    plain = found.pop(None)
    errors = [float((value - plain).norm()) for value in found.values()]
    assert 0 < errors[0] < errors[1] < errors[2] < float(plain.norm())


def test_bitsandbytes_is_asked_for_where_it_lacks(
    base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    settings = {"prompt_cache": str(tmp_path / "cache"), "text_encoder_quantization": "nf4"}
    with pytest.raises(ValueError, match=r'model.text_encoder_quantization: got "nf4" on cpu, .*bitsandbytes'):
        load(recipe_of_family(CASES["flux"], base("flux"), tmp_path / "run", **settings))


def test_embeddings_that_come_with_a_folder_are_not_quantised(flux: Path, tmp_path: Path) -> None:
    recipe = make_recipe(flux, tmp_path / "run", text_encoder_quantization="fp8")
    with pytest.raises(ValueError, match=r'text_encoder_quantization: got "fp8" for .* no text encoders, want null'):
        load_model(recipe, checks.CPU, [Prompt("red", {})])
    assert settings_of(recipe).text_encoder_quantization == "fp8"
