"""Block ops, attention, checkpoints, tiles and float8 weights of a recipe: what is put in, and that results stay."""

import inspect
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.memory import ledger
from dancegrpo_fast.memory.planning.blocks import compose
from dancegrpo_fast.memory.planning.rewards import REWARDS
from dancegrpo_fast.memory.planning.settings import GIB
from dancegrpo_fast.models import load_model, setup
from dancegrpo_fast.models.planning import settings_of
from dancegrpo_fast.prompts import Prompt
from dancegrpo_fast.recipe import EvaluationSettings, LoraSettings, Recipe, RewardSettings
from dancegrpo_fast.rewards.clip_score import ClipScore
from dancegrpo_fast.rewards.hps import Hps
from dancegrpo_fast.rewards.pickscore import PickScore
from dancegrpo_fast.rewards.videoalign import VideoQuality

from ..tolerances import PREDICTED_BYTES
from ..train.tiny import make_recipe, reward
from . import checks

diffusers = pytest.importorskip("diffusers")

# The planner keeps whole bytes of margins.
SLACK = 64
BF16: dict[str, Any] = {"dtype": "bfloat16", "master_dtype": "float32"}


@pytest.fixture(scope="module")
def unchanged(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with nothing put in."""
    output = tmp_path_factory.mktemp("unchanged") / "run"
    checks.train(flux, output, **BF16)
    return output


def loaded(flux: Path, folder: Path, **changes: Any) -> tuple[Recipe, Any]:
    recipe = make_recipe(flux, folder / "run", **changes)
    return recipe, load_model(recipe, checks.CPU, [Prompt("red", {})])


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpointing": "full"},
        {"checkpointing": "attention", "block_ops": "lossless"},
        {"checkpointing": "matmul", "attention": "native"},
        {"checkpointing": "first:1", "attention": "auto"},
    ],
    ids=lambda c: c["checkpointing"],
)
def test_policies_change_no_bit(flux: Path, unchanged: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    checks.train(flux, tmp_path / "run", **BF16, **changes)
    checks.assert_same_weights(tmp_path / "run", unchanged)


def test_auto_takes_what_fits(flux: Path, unchanged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, model = loaded(flux, tmp_path, micro_batch=4, prompts_per_iteration=2, group_size=2, num_steps=3, **BF16)
    iteration = checks.pieces(recipe, model)
    bare, full = (
        max(phase.bytes for phase in iteration.training(compose(iteration.replay, policy)))
        for policy in ("none", "full")
    )
    assert full < bare
    for name, size in (("none", bare), ("mixed", (bare + full) // 2)):
        gib = checks.least_gib(iteration, size + SLACK)
        checks.train(flux, tmp_path / name, checkpointing="auto", memory_gib=gib, **BF16)
        said = capsys.readouterr().out.splitlines()[0]
        assert said.startswith("checkpointing ") and "of 0.8" in said
        chosen = said.removeprefix("checkpointing ").partition(":")[0]
        assert chosen == "none" if name == "none" else chosen not in ("none", "full")
        checks.assert_same_weights(tmp_path / name, unchanged)


def test_auto_refuses_what_does_not_fit(flux: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"with model.memory_gib 0.50, want at least 0.\d\d for the replay"):
        loaded(flux, tmp_path, checkpointing="auto", memory_gib=0.5, **BF16)
    with pytest.raises(ValueError, match=r'"auto" on the CPU, want model.memory_gib'):
        loaded(flux, tmp_path, checkpointing="auto", **BF16)
    with pytest.raises(ValueError, match=r'"auto" in float32 throughout, want model.dtype bfloat16'):
        loaded(flux, tmp_path, checkpointing="auto", memory_gib=1.0)


@pytest.mark.release
def test_gradients_are_reduced_as_often_as_the_memory_allows(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"mixed_precision": "bf16", "vae_tiling": "off"}
    update, call = checks.syncing(make_recipe(flux, tmp_path / "run", **options), 8)
    assert call < update
    # Where each has all weights, gradients are there anyway, and nothing is asked for.
    assert loaded(flux, tmp_path, gradient_sync="auto")[1].gradient_sync == "update"
    assert loaded(flux, tmp_path, gradient_sync="call")[1].gradient_sync == "call"
    monkeypatch.setattr(setup, "processes", lambda: (8, "full_shard"))
    assert capsys.readouterr().out == ""
    for gib, chosen in ((update, "update"), ((update + call) / 2, "call")):
        given = options | {"gradient_sync": "auto", "memory_gib": gib}
        assert loaded(flux, tmp_path, **given)[1].gradient_sync == chosen
        assert capsys.readouterr().out.startswith(f"gradient_sync {chosen}: ")
    # Policies are chosen for what was found.
    given = options | {"gradient_sync": "auto", "checkpointing": "auto", "memory_gib": update + SLACK / GIB}
    _, model = loaded(flux, tmp_path, **given)
    assert model.gradient_sync == "update" and capsys.readouterr().out.count("\ncheckpointing none: ") == 1
    # Another process may have less.
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: [*found, "call"])
    assert loaded(flux, tmp_path, **options, gradient_sync="auto", memory_gib=update)[1].gradient_sync == "call"
    assert capsys.readouterr().out == "gradient_sync call: for another process\n"
    with pytest.raises(ValueError, match=r'gradient_sync: got "auto" on CPUs, want model.memory_gib, "update" or'):
        loaded(flux, tmp_path, **options, gradient_sync="auto")
    with pytest.raises(ValueError, match=r'gradient_sync: got "auto" in float32 throughout, want model.dtype'):
        loaded(flux, tmp_path, gradient_sync="auto", memory_gib=update)


def test_one_pass_is_of_the_kind_that_fits(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"passes": 1, "mixed_precision": "bf16", "vae_tiling": "off", "memory_gib": 8.0}
    assert loaded(flux, tmp_path, **options)[1].passes == "retain"
    assert capsys.readouterr().out.startswith("passes retain: ")
    assert loaded(flux, tmp_path, **options | {"memory_gib": 0.5})[1].passes == 2
    assert loaded(flux, tmp_path, passes="retain")[1].passes == "retain"
    # Another process may have less.
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: [*found, "2"])
    monkeypatch.setattr(setup, "processes", lambda: (2, "none"))
    capsys.readouterr()
    assert loaded(flux, tmp_path, **options)[1].passes == 2
    assert capsys.readouterr().out == "passes 2: for another process\n"
    with pytest.raises(ValueError, match=r"train.passes: got 1 on the CPU, want model.memory_gib, 2"):
        loaded(flux, tmp_path, passes=1, mixed_precision="bf16")
    with pytest.raises(ValueError, match=r"train.passes: got 1 in float32 throughout, want model.dtype"):
        loaded(flux, tmp_path, passes=1, memory_gib=8.0)


def test_nothing_is_recomputed_without_training(flux: Path, tmp_path: Path) -> None:
    recipe, _ = loaded(flux, tmp_path, checkpointing="full")
    for training in (True, False):
        model: Any = load_model(recipe, checks.CPU, [Prompt("red", {})], training=training)
        assert model.denoiser.gradient_checkpointing is training


def test_attention_is_set_on_the_model_and_said(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, model = loaded(flux, tmp_path, attention="auto")
    backends = {processor._attention_backend for processor in model.denoiser.attn_processors.values()}
    assert len(backends) == 1 and None not in backends
    assert capsys.readouterr().out.startswith(f"attention {backends.pop().value}: CPU flash, trains")
    with pytest.raises(ValueError, match=r'model.attention: got "flash", backend: got "flash", which runs on cuda'):
        loaded(flux, tmp_path, attention="flash")
    with pytest.raises(ValueError, match=r'model.attention: got "fast", backend: got "fast", want one of'):
        loaded(flux, tmp_path, attention="fast")


@pytest.mark.release
def test_the_vae_is_tiled_where_a_whole_decode_does_not_fit(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, model = loaded(flux, tmp_path, height=64, width=64)
    assert not model.vae.use_tiling
    iteration = checks.pieces(recipe, model)
    whole = iteration.decoding().bytes
    enough, small = (checks.least_gib(iteration, size) for size in (whole + SLACK, whole - SLACK))
    assert not loaded(flux, tmp_path, height=64, width=64, memory_gib=enough)[1].vae.use_tiling
    assert capsys.readouterr().out == ""
    # The largest that fits: 64 does not, and sides are multiples of 8.
    assert loaded(flux, tmp_path, height=64, width=64, memory_gib=small)[1].tile == 56
    assert capsys.readouterr().out.startswith("VAE in tiles of 56 pixels: whole, a micro-batch takes")
    assert loaded(flux, tmp_path, height=64, width=64, memory_gib=small, vae_tile=16)[1].tile == 16
    with pytest.raises(ValueError, match=r'model.vae_tiling: got "auto" with 0.50 GiB, of which a whole decode takes'):
        loaded(flux, tmp_path, height=64, width=64, memory_gib=0.5)
    assert not loaded(flux, tmp_path, height=64, width=64, memory_gib=small, vae_tiling="off")[1].vae.use_tiling


class Decoder(nn.Module):
    """A loaded model whose call is its decode."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vae = model.vae

    def forward(self, z: torch.Tensor) -> Any:
        return self.vae.decode(z, return_dict=False)


@pytest.mark.release
def test_a_tiled_decode_takes_what_the_run_is_planned_with(flux: Path, tmp_path: Path) -> None:
    """By torch's own CPU allocator, with a VAE wide enough that oneDNN computes its convolutions."""
    base = shutil.copytree(flux, tmp_path / "base")
    wide = {"block_out_channels": (32, 64), "norm_num_groups": 8, "latent_channels": 4}
    kinds = {
        f"{way}_block_types": (f"{kind}Block2D",) * 2 for way, kind in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    diffusers.AutoencoderKL(**wide, **kinds).save_pretrained(base / "vae")
    recipe, model = loaded(base, tmp_path, height=128, width=128, vae_tiling="on", vae_tile=64)
    latents = torch.randn(recipe.train.micro_batch, 4, 64, 64)
    taken = ledger.measure(Decoder(model), {"z": latents}, train=False)
    found = checks.pieces(recipe, model)
    assert (found.tile, found.decode.weights) == (64, taken.fixed - latents.nbytes)
    # Of the latents of a micro-batch the plan has one sample's.
    beside = taken.allocator_peak - taken.fixed + latents[0].nbytes
    assert sum(found.decode.peak.values()) == pytest.approx(beside, rel=PREDICTED_BYTES)


def test_the_planner_is_asked_about_this_run(flux: Path, tmp_path: Path) -> None:
    recipe, model = loaded(
        flux, tmp_path, mixed_precision="bf16", kl_weight=0.1, rewards=[reward("Brightness")], block_ops="fast"
    )
    asked = setup._settings(model, recipe, checks.CPU, text_tokens=3, gib=24.0)
    assert (asked.samples, asked.micro_batch, asked.num_steps) == (12, 4, 4)
    assert (asked.guidance_scale, asked.text_tokens) == (1.0, 3)
    assert (asked.precision, asked.block_ops, asked.device, asked.gpu_gib) == ("fp32_master", "fast", "cpu", 24.0)
    # The model that the KL is taken to is a second one.
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    assert asked.kl_reference and not asked.ema and asked.frozen_dtype == "float32"
    assert checks.pieces(recipe, model).copies == 4 * parameters


def test_float16_is_planned_as_bfloat16(flux: Path, tmp_path: Path) -> None:
    for more in ({"lora": LoraSettings()}, {"master_dtype": "float32"}):
        narrow, other = (make_recipe(flux, tmp_path, dtype=name, **more) for name in ("float16", "bfloat16"))
        same = settings_of(narrow).changed(dtype="bfloat16", frozen_dtype="bfloat16")
        assert same == settings_of(other)
        assert settings_of(narrow).precision.startswith("bf16")


def test_reward_models_are_counted_once_and_as_wide_as_they_are(flux: Path, tmp_path: Path) -> None:
    recipe, model = loaded(flux, tmp_path)
    trained = [RewardSettings("videoalign_vq"), RewardSettings("hps", args={"dtype": "float16"})]
    judges = EvaluationSettings(rewards=[RewardSettings("videoalign_mq"), RewardSettings("clip_score")])
    asked = setup._settings(model, replace(recipe, rewards=trained, evaluation=judges), checks.CPU, 3, 24.0)
    widths = {one.name: one.bytes_per_parameter for one in asked.rewards}
    assert widths == {"videoalign": 2, "hps": 2, "clip_score": 4}
    # Those that are named on the command line are as wide as the trainer loads them unasked.
    loads = {"hps": Hps, "pickscore": PickScore, "clip_score": ClipScore, "clip_score_h": ClipScore}
    for name, counted in REWARDS.items():
        unasked = inspect.signature(loads.get(name, VideoQuality)).parameters["dtype"].default
        assert counted.bytes_per_parameter == {"float32": 4, "bfloat16": 2}[unasked]


def test_every_process_plans_its_share(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, model = loaded(flux, tmp_path, micro_batch=2, ema_decay=0.9, offload=["vae", "rewards"])
    alone = setup._settings(model, recipe, checks.CPU, 3, 24.0)
    assert (alone.samples, alone.fsdp, alone.strategy, alone.offload) == (12, 1, "none", ("vae", "rewards"))
    assert alone.ema and not alone.kl_reference
    monkeypatch.setattr(setup, "processes", lambda: (8, "full_shard"))
    shared = setup._settings(model, recipe, checks.CPU, 3, 24.0)
    assert (shared.samples, shared.fsdp, shared.strategy) == (2, 8, "full_shard")
    assert shared.gradient_sync == "update"
