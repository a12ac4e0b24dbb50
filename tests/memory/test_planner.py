"""The planner: composed of few blocks it says what the whole model does, and its parts add up."""

import subprocess
import sys
import weakref
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dancegrpo_fast.memory.planning.advice import knobs
from dancegrpo_fast.memory.planning.blocks import compose
from dancegrpo_fast.memory.planning.budget import CATEGORIES, Advice
from dancegrpo_fast.memory.planning.cards import Rates
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.margins import with_margins
from dancegrpo_fast.memory.planning.planner import Plan, plan
from dancegrpo_fast.memory.planning.quantised import INT8, conversion_bytes, quantised
from dancegrpo_fast.memory.planning.settings import GIB, Settings
from dancegrpo_fast.memory.planning.sharding import state_bytes_8bit, weights_of

from ..processes import LIMIT
from ..tolerances import COMPOSED
from .small import FLUX, case_of, phase_of, tiny

pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("collected_once")

MASTERS = {"dtype": "float32", "mixed_precision": "bf16"}


def replay_of(found: Plan) -> int:
    return max(phase.bytes for phase in found.phases if phase.name.startswith("replay"))


def test_phases_are_in_order_and_add_up(flux: Plan) -> None:
    names = ["text encoding", "weights", "rollout", "decode", "rewards", "replay forward", "replay backward"]
    assert [phase.name for phase in flux.phases] == [*names, "optimizer"]
    for phase in flux.phases:
        assert set(phase.budget) <= set(CATEGORIES)
        assert phase.bytes == sum(phase.budget.values())
        assert phase.bytes == max(sum(there.values()) for _, there in phase.timeline)
        assert [at for at, _ in phase.timeline] == sorted(at for at, _ in phase.timeline)
    assert flux.peak_bytes == max(phase.bytes for phase in flux.phases)
    assert flux.total_bytes == flux.peak_bytes + sum(flux.margins.values())
    assert flux.fits(flux.total_bytes / GIB) and not flux.fits((flux.total_bytes - 1) / GIB)


def test_trajectories_and_guidance(flux: Plan, unet: Settings) -> None:
    latents = 16 * 32 * 32 * 4 * 12 * 17
    text = 512 * 4096 * 2 + 768 * 2
    assert phase_of(flux, "rollout").budget["trajectories"] == latents + text
    # FLUX has embedded guidance, Stable Diffusion takes a second row.
    again = plan(flux.settings.changed(guidance_scale=3.5), advise=False)
    assert again.peak_bytes == flux.peak_bytes
    changes: tuple[dict[str, Any], ...] = ({}, {"guidance_scale": 7.5}, {"micro_batch": 2, "rollout_batch": 2})
    plain, guided, double = (plan(unet.changed(checkpointing="full", **each), advise=False) for each in changes)
    one, two, rows = (phase_of(found, "replay backward") for found in (plain, guided, double))
    assert one.bytes < two.bytes and two.budget["block inputs"] == rows.budget["block inputs"]


def test_auto_takes_the_cheapest_that_fits(flux: Plan) -> None:
    roomy = plan(flux.settings.changed(checkpointing="auto"), advise=False)
    assert roomy.policy == "none"
    replay, bare = replay_of(flux), replay_of(roomy)
    between = (replay + bare) / 2 / GIB + sum(flux.margins.values()) / GIB
    tight = plan(flux.settings.changed(checkpointing="auto", gpu_gib=between), advise=False)
    assert tight.fits(between)
    assert roomy.seconds < tight.seconds < flux.seconds
    assert replay < replay_of(tight) < bare


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("unet")
    model, _ = tiny("unet")
    model.save_config(folder / "unet")  # type: ignore[operator]  # diffusers' method
    return Settings(str(folder), attention="flash")


def test_blocks_of_a_unet_have_every_policy(unet: Settings) -> None:
    names = ("none", "first:3", "matmul", "attention", "full")
    found = {name: replay_of(plan(unet.changed(checkpointing=name), advise=False)) for name in names}
    assert found["none"] > found["matmul"] > found["attention"] > found["full"]
    assert found["none"] > found["first:3"] > found["full"]


def test_auto_mixes_policies_of_a_unets_blocks(unet: Settings) -> None:
    bare, full = (plan(unet.changed(checkpointing=name), advise=False) for name in ("none", "full"))
    most, least = replay_of(bare), replay_of(full)
    seconds = []
    for between in (0.25, 0.75):
        limit = least + between * (most - least)
        gib = with_margins(unet, limit) / GIB
        found = plan(unet.changed(checkpointing="auto", gpu_gib=gib), advise=False)
        assert replay_of(found) <= limit
        assert " x " in found.policy and any("ResNets" in reason for reason in found.reasons)
        seconds.append(found.seconds)
    assert seconds[0] > seconds[1]


def test_block_inputs_on_the_host(flux: Plan) -> None:
    away = plan(flux.settings.changed(offload=("block_inputs",)), advise=False)
    backward, here = (phase_of(found, "replay backward") for found in (away, flux))
    assert backward.budget["block inputs"] < here.budget["block inputs"]
    assert backward.bytes < here.bytes
    assert away.seconds >= flux.seconds


def test_shards_are_whole_parts() -> None:
    def states(**given: object) -> dict[str, int]:
        return Iteration(Settings(**FLUX, **given)).step().budget  # type: ignore[arg-type]  # any setting

    one = states(**MASTERS)
    four = states(**MASTERS, fsdp=4)
    for name in ("master weights", "gradients", "optimizer"):
        assert four[name] == pytest.approx(one[name] / 4, rel=COMPOSED)
    assert states(**MASTERS, fsdp=4, rollout_replica=True) == four


@pytest.mark.release
def test_quantised_bases_and_states(flux: Plan) -> None:
    assert state_bytes_8bit([4095, 4096]) == 8 * 4095 + 2 * 4096 + 8 * 16
    case = case_of("flux-dev", 256, lora=16)
    stored = {base: quantised(case, base).stored for base in ("nf4", "int8", "fp8")}
    # Layerwise casting leaves modulations alone, which have "norm" in their names.
    assert list(stored.values()) == sorted(stored.values())
    whole = flux.phases[1].budget["parameters"]
    assert whole == weights_of(case).bytes
    for base, size in stored.items():
        assert size < 0.7 * whole
        found = plan(flux.settings.changed(quantization=base), advise=False)
        assert found.phases[1].budget["parameters"] == size


def test_layerwise_casting_keeps_the_casts_of_blocks_that_are_not_checkpointed(flux: Plan) -> None:
    backward = []
    for policy in ("full", "none"):
        for base in ("none", "fp8"):
            found = plan(flux.settings.changed(quantization=base, checkpointing=policy), advise=False)
            backward.append(phase_of(found, "replay backward").bytes)
    assert backward[1] < backward[0] and backward[3] > backward[2]


def test_denoiser_waits_while_others_run(flux: Plan) -> None:
    away = plan(flux.settings.changed(offload=("denoiser", "vae", "rewards")), advise=False)
    for phase in away.phases:
        if phase.name in ("decode", "rewards"):
            assert "parameters" not in phase.budget and phase.budget["other models"] > 0
            assert phase.budget["optimizer"] > 0
        if phase.name.startswith("replay"):
            assert "other models" not in phase.budget
    assert away.seconds > flux.seconds


def gib_of(found: Plan) -> float:
    return found.total_bytes / GIB


def printed(text: str, other: Plan, plain: Plan) -> Advice:
    """What changing to another plan gives, rounded as it is shown."""
    return Advice(text, round(gib_of(other) - gib_of(plain), 2), round(other.seconds / plain.seconds - 1, 3))


def test_advice_is_recomputed(flux: Plan) -> None:
    advised = plan(flux.settings.changed(checkpointing="none"), thorough=True)
    full = next(advice for advice in advised.advice if advice.text.startswith("checkpointing full"))
    assert full == printed(full.text, flux, advised)
    assert full.seconds > 0 > full.gib
    # What saves neither is not shown, and what is shown is ranked by what is shown.
    assert all(advice.gib < 0 or advice.seconds < 0 for advice in advised.advice)
    fitting = [advice for advice in advised.advice if not advice.text.endswith("does not fit")]
    assert fitting == sorted(fitting, key=lambda advice: (advice.seconds, advice.gib))
    swapped = next(advice for advice in fitting if advice.text.startswith("blocks_to_swap 28: "))
    assert swapped == printed(swapped.text, plan(advised.settings, advise=False, blocks_to_swap=28), advised)
    # Weights are shared where a run on one GPU had no word for it.
    alone = replace(advised, settings=flux.settings.changed(strategy="none"))
    (more,) = (knob for knob in knobs(alone, host=False, count=57, thorough=True) if "under FSDP" in knob.text)
    assert flux.settings.changed(**more.changes).is_sharded
    ops = next(advice for advice in fitting if advice.text.startswith("block ops"))
    assert ops == printed(
        ops.text, plan(advised.settings.changed(block_ops="lossless", recompute="all"), advise=False), advised
    )


@pytest.mark.release
@pytest.mark.parametrize("model", ["sd14", "sd35-medium"])
def test_advice_for_models_of_no_and_two_kinds_of_blocks(model: str) -> None:
    advised = plan(Settings(model, height=256, width=256, attention="flash", checkpointing="none", gpu_gib=40.0))
    assert any(advice.text.startswith("checkpointing full") for advice in advised.advice)
    assert any("blocks" in advice.text for advice in advised.advice) == (model != "sd14")


def test_advice_on_parts_of_the_blocks(flux: Plan) -> None:
    """Between full and no checkpointing there is room for some blocks."""
    none = plan(flux.settings.changed(checkpointing="none"), advise=False)
    tight = flux.settings.changed(gpu_gib=(gib_of(flux) + gib_of(none)) / 2)
    advised = plan(tight)
    some = [advice for advice in advised.advice if advice.text.startswith("drop checkpointing (full) on ")]
    words = [advice.text.removeprefix("drop checkpointing (full) on ").split() for advice in some]
    assert {" ".join(each[-2:]) for each in words} == {"double blocks", "single blocks"}
    # As a run would have them: the last blocks of a kind.
    for advice, each in zip(some, words, strict=True):
        start, of = (0, 19) if each[-2] == "double" else (19, 38)
        count = of if each[0] == "all" else int(each[0])
        policies: list[Hashable] = ["full"] * 57
        policies[start + of - count : start + of] = ["none"] * count
        iteration = Iteration(tight)
        phases = iteration.training(compose(iteration.replay, policies))
        assert with_margins(tight, max(phase.bytes for phase in phases)) <= tight.gpu_gib * GIB
        assert advice.seconds < 0 < advice.gib
    auto = next(advice for advice in advised.advice if advice.text.startswith("checkpointing auto: "))
    assert auto == printed(auto.text, plan(tight.changed(checkpointing="auto"), advise=False), advised)
    fitting = [advice for advice in advised.advice if not advice.text.endswith("does not fit")]
    assert auto.seconds == min(
        advice.seconds for advice in fitting if advice.text.startswith(("checkpointing", "drop"))
    )


def test_auto_takes_the_cheaper_of_device_and_host(flux: Plan) -> None:
    replay = replay_of(flux)
    # A little more than full checkpointing takes, all of it on the device.
    gib = with_margins(flux.settings, 1.01 * replay) / GIB
    asked = flux.settings.changed(checkpointing="auto", gpu_gib=gib)
    found = Iteration(asked).pick()
    assert found.blocks.host_inputs and found.name.endswith("on the host")
    slow = asked.changed(rates=Rates(pcie_gb_s=0.001))
    assert not Iteration(slow).pick().blocks.host_inputs
    roomy = plan(asked.changed(offload=("block_inputs",), gpu_gib=80), advise=False)
    assert roomy.policy == "none"
    assert roomy.seconds == plan(flux.settings.changed(checkpointing="none"), advise=False).seconds


def test_converting_quantised_weights_takes_time(flux: Plan) -> None:
    slow = Rates(bandwidth_gb_s=1.0)
    given = flux.settings.changed(rates=slow, checkpointing="full")
    seconds = {
        base: plan(given.changed(quantization=base), advise=False).seconds for base in ("none", "nf4", "int8", "fp8")
    }
    assert seconds["none"] < seconds["fp8"] < seconds["nf4"] < seconds["int8"]
    found = quantised(case_of("flux-dev", 256, lora=16), "fp8")
    # Each byte of a weight is read, and two are written.
    assert conversion_bytes(found, ("none",)) == (1.5 * found.converted, 0)
    assert conversion_bytes(found, ("full",)) == (1.5 * found.converted, 1.5 * sum(found.in_blocks))
    assert 0 < sum(found.in_blocks) < found.converted


def test_int8_keeps_inputs_that_checkpoints_drop(flux: Plan) -> None:
    """What the plan's reasons say of it."""
    assert INT8 in plan(flux.settings.changed(quantization="int8"), advise=False).reasons
    assert INT8 not in flux.reasons
    bnb = pytest.importorskip("bitsandbytes")
    layers = (
        bnb.nn.Linear8bitLt(16, 16, bias=False, has_fp16_weights=False, threshold=0.0),
        bnb.nn.Linear4bit(16, 16, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16),
    )
    assert [input_lives(layer.to("cpu")) for layer in layers] == [True, False]


def input_lives(layer: nn.Module) -> bool:
    """After a checkpointed forward, what a layer was called with."""
    inside: list[weakref.ref[torch.Tensor]] = []

    def run(x: torch.Tensor) -> Any:
        doubled = 2 * x
        inside.append(weakref.ref(doubled))
        return layer(doubled)

    out = checkpoint(run, torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True), use_reentrant=False)
    return out.requires_grad and inside[0]() is not None


def test_rates_scale_seconds(flux: Plan) -> None:
    fast = Rates(**{name: 2 * value for name, value in vars(Rates()).items()} | {"launch_us": Rates().launch_us / 2})
    assert plan(flux.settings.changed(rates=fast), advise=False).seconds == pytest.approx(flux.seconds / 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "no-such-model"}, 'model: got "no-such-model"'),
        ({"model": "hunyuan-video", "frames": 54}, "frames: got 54, want 4 n \\+ 1"),
        ({"model": "flux-dev", "frames": 5}, "frames: got 5, want 1"),
        ({"model": "flux-dev", "height": 500}, "height: got 500, want a multiple of 16"),
        ({"model": "flux-dev", "lora": 8, "target_modules": ("nothing",)}, "target_modules: got nothing"),
        ({"model": "flux-dev", "fsdp": 0}, "fsdp: got 0, want an integer of at least 1"),
        ({"model": "flux-dev", "card": "h1000"}, 'card: got "h1000", want one of h100, '),
        ({"model": "flux-dev", "quantization": "nf4"}, 'quantization: got "nf4" with full fine-tuning'),
        (
            {"model": "flux-dev", "checkpointing": "first:900"},
            'checkpointing: got "first:900", want at most the model\'s 57',
        ),
        ({"model": "flux-dev", "checkpointing": "some"}, 'checkpointing: got "some"'),
        ({"model": "flux-dev", "checkpointing": "none", "offload": ("block_inputs",)}, "offload: got block_inputs"),
        ({"model": "flux-dev", "checkpointing": "first:0", "offload": ("block_inputs",)}, "offload: got block_inputs"),
        ({"model": "flux-dev", "offload": ("optimizer",)}, 'offload: got "optimizer", want one of'),
        ({"model": "flux-dev", "fsdp": 2, "strategy": "none", "offload": ("denoiser",)}, "offload: got denoiser with"),
        (
            {"model": "flux-dev", "lora": 8, "quantization": "int8", "offload": ("denoiser",)},
            'offload: got denoiser with quantization "int8"',
        ),
        ({"model": "flux-dev", "torch_version": "2.9rc1"}, 'torch_version: got "2.9rc1", want one such as "2.7"'),
        ({"model": "flux-dev", "gradient_sync": "never"}, 'gradient_sync: got "never", want one of auto, update, call'),
        ({"model": "flux-dev", "rollout_replica": True}, "rollout_replica: got True"),
        ({"model": "flux-dev", "micro_batch": 13}, "micro_batch: got 13, want at most"),
        ({"model": "flux-dev", "attention": "xformers9"}, 'attention: got "xformers9"'),
        ({"model": "flux-dev", "lora": 8, "target_modules": ("to_q", "foo")}, "target_modules: got foo, want"),
        ({"model": "flux-dev", "lora": 8, "target_modules": "to_q"}, "target_modules: got 'to_q', want a tuple"),
        ({"model": "flux-dev", "checkpointing": 3}, "checkpointing: got 3, want a string"),
        ({"model": "flux-dev", "timestep_fraction": "a"}, "timestep_fraction: got 'a', want"),
        ({"model": "flux-dev", "offload": "vae"}, "offload: got 'vae', want a tuple"),
        ({"model": "flux-dev", "gpu_gib": float("nan")}, "gpu_gib: got nan"),
    ],
)
def test_bad_input(given: dict[str, object], message: str) -> None:
    if "height" not in given:
        given = given | {"height": 256, "width": 256}
    with pytest.raises(ValueError, match=message):
        plan(Settings(**given), advise=False)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("version", ["2.7", "2.13.0+cpu", "2.14.0.dev20261101+cu130"])
def test_versions_of_torch(version: str) -> None:
    assert Settings("flux-dev", torch_version=version).fused_norm == (version != "2.7")


def test_the_package_loads_no_diffusers() -> None:
    code = "import sys, dancegrpo_fast.memory as m; m.Settings; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)
