"""The planner: composed of few blocks it says what the whole model does, and its parts add up."""

import subprocess
import sys

import pytest

from dancegrpo_fast.memory.phases import Case
from dancegrpo_fast.memory.planner import CATEGORIES, Iteration, Plan, plan
from dancegrpo_fast.memory.quantised import quantised
from dancegrpo_fast.memory.settings import GIB, REWARDS, Rates, Settings
from dancegrpo_fast.memory.sharding import state_bytes_8bit, weights_of

from ..tolerances import COMPOSED
from .small import tiny

pytest.importorskip("diffusers")

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FLUX = {"model": "flux-dev", "height": 256, "width": 256, "attention": "flash"}
SD = {"model": "sd14", "attention": "flash"}


def case_of(model: str, frames: int, height: int, width: int, lora: int = 0, train: bool = True) -> Case:
    targets = TARGETS if lora else ()
    return Case(model, frames, height, width, 1, None, "bf16", lora, targets, "bf16", "flash", "off", "gelu", train)


@pytest.fixture(scope="module")
def flux() -> Plan:
    return plan(Settings(**FLUX, lora=16, policy="full", rewards=(REWARDS["hps-v2.1"],)), advise=False)


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


def test_trajectories_and_guidance(flux: Plan) -> None:
    latents = 16 * 32 * 32 * 4 * 12 * 17
    rollout = next(phase for phase in flux.phases if phase.name == "rollout")
    text = 512 * 4096 * 2 + 768 * 2
    assert rollout.budget["trajectories"] == latents + text
    # FLUX has embedded guidance, Stable Diffusion takes a second row.
    again = plan(flux.settings.changed(cfg=3.5), advise=False)
    assert again.peak_bytes == flux.peak_bytes
    plain = plan(Settings(**SD, policy="full"), advise=False)
    guided = plan(Settings(**SD, policy="full", cfg=7.5), advise=False)
    double = plan(Settings(**SD, policy="full", micro_batch=2, rollout_batch=2), advise=False)
    at = [phase.name for phase in plain.phases].index("replay backward")
    assert plain.phases[at].bytes < guided.phases[at].bytes
    assert guided.phases[at].budget["block inputs"] == double.phases[at].budget["block inputs"]


def test_auto_takes_the_cheapest_that_fits(flux: Plan) -> None:
    roomy = plan(flux.settings.changed(policy="auto"), advise=False)
    assert roomy.policy == "none"
    replay = [phase.bytes for phase in flux.phases if phase.name.startswith("replay")]
    bare = [phase.bytes for phase in roomy.phases if phase.name.startswith("replay")]
    between = (max(replay) + max(bare)) / 2 / GIB + sum(flux.margins.values()) / GIB
    tight = plan(flux.settings.changed(policy="auto", gpu_gib=between), advise=False)
    assert tight.fits(between)
    assert roomy.seconds < tight.seconds < flux.seconds
    assert max(replay) < max(phase.bytes for phase in tight.phases if phase.name.startswith("replay")) < max(bare)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("unet")
    model, _ = tiny("unet")
    model.save_config(folder / "unet")  # type: ignore[operator]  # diffusers' method
    return Settings(str(folder), attention="flash")


def replay_bytes(settings: Settings) -> int:
    found = plan(settings, advise=False)
    return max(phase.bytes for phase in found.phases if phase.name.startswith("replay"))


def test_blocks_of_a_unet_have_every_policy(unet: Settings) -> None:
    names = ("none", "first:3", "matmul", "attention", "full")
    found = {name: replay_bytes(unet.changed(policy=name)) for name in names}
    assert found["none"] > found["matmul"] > found["attention"] > found["full"]
    assert found["none"] > found["first:3"] > found["full"]


def test_auto_mixes_policies_of_a_unets_blocks(unet: Settings) -> None:
    most, least = (replay_bytes(unet.changed(policy=name)) for name in ("none", "full"))
    margins = plan(unet.changed(policy="full"), advise=False).margins
    share = margins.pop("fragmentation") / GIB / unet.gpu_gib
    seconds = []
    for between in (0.25, 0.75):
        limit = least + between * (most - least)
        gib = (limit + sum(margins.values())) / GIB / (1 - share)
        found = plan(unet.changed(policy="auto", gpu_gib=gib), advise=False)
        assert replay_bytes(unet.changed(policy="auto", gpu_gib=gib)) <= limit
        assert " x " in found.policy and any("ResNets" in reason for reason in found.reasons)
        seconds.append(found.seconds)
    assert seconds[0] > seconds[1]


def test_block_inputs_on_the_host(flux: Plan) -> None:
    away = plan(flux.settings.changed(offload=("block_inputs",)), advise=False)
    backward = {phase.name: phase for phase in away.phases}["replay backward"]
    here = {phase.name: phase for phase in flux.phases}["replay backward"]
    assert backward.budget["block inputs"] < here.budget["block inputs"]
    assert backward.bytes < here.bytes
    assert away.seconds >= flux.seconds


def test_shards_are_whole_parts() -> None:
    def states(**given: object) -> dict[str, int]:
        return Iteration(Settings(**FLUX, **given)).step().budget  # type: ignore[arg-type]  # any setting

    one = states(dtype="fp32_master")
    four = states(dtype="fp32_master", fsdp=4)
    for name in ("master weights", "gradients"):
        assert four[name] == pytest.approx(one[name] / 4, rel=COMPOSED)
    assert four["optimizer"] == pytest.approx(one["optimizer"] / 4, rel=COMPOSED)
    replica = states(dtype="fp32_master", fsdp=4, replica=True)
    assert replica["replica"] == one["master weights"] // 2


def test_quantised_bases_and_states(flux: Plan) -> None:
    assert state_bytes_8bit([4095, 4096]) == 8 * 4095 + 2 * 4096 + 8 * 16
    case = case_of("flux-dev", 1, 256, 256, lora=16)
    stored = {base: quantised(case, base).stored for base in ("nf4", "int8", "fp8")}
    # Layerwise casting leaves modulations alone, which have "norm" in their names.
    assert list(stored.values()) == sorted(stored.values())
    whole = flux.phases[1].budget["parameters"]
    assert whole == weights_of(case).bytes
    for base, size in stored.items():
        assert size < 0.7 * whole
        found = plan(flux.settings.changed(base=base), advise=False)
        assert found.phases[1].budget["parameters"] == size


def test_layerwise_casting_keeps_the_casts_of_blocks_that_are_not_checkpointed(flux: Plan) -> None:
    backward = []
    for policy in ("full", "none"):
        for base in ("none", "fp8"):
            found = plan(flux.settings.changed(base=base, policy=policy), advise=False)
            backward.append(next(phase for phase in found.phases if phase.name == "replay backward").bytes)
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


def test_advice_is_recomputed(flux: Plan) -> None:
    advised = plan(flux.settings.changed(policy="none"))
    full = next(advice for advice in advised.advice if advice.text.startswith("policy full"))
    assert full.gib == pytest.approx((flux.total_bytes - advised.total_bytes) / GIB, rel=COMPOSED)
    assert full.seconds == pytest.approx(flux.seconds / advised.seconds - 1, rel=COMPOSED)
    assert full.seconds > 0 > full.gib


def test_rates_scale_seconds(flux: Plan) -> None:
    fast = Rates(**{name: 2 * value for name, value in vars(Rates()).items()})
    assert plan(flux.settings.changed(rates=fast), advise=False).seconds == pytest.approx(flux.seconds / 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "no-such-model"}, 'model: got "no-such-model"'),
        ({"model": "hunyuan-video", "frames": 54}, "frames: got 54, want 4 n \\+ 1"),
        ({"model": "flux-dev", "frames": 5}, "frames: got 5, want 1"),
        ({"model": "flux-dev", "height": 500}, "height: got 500, want a multiple of 16"),
        ({"model": "flux-dev", "lora": 8, "lora_targets": ("nothing",)}, "lora_targets: got nothing"),
        ({"model": "flux-dev", "fsdp": 0}, "fsdp: got 0, want an integer of at least 1"),
        ({"model": "flux-dev", "lora": 8, "gpu_gib": 10}, "gpu_gib: got 10, want more than 2"),
        ({"model": "flux-dev", "base": "nf4"}, 'base: got "nf4" with full fine-tuning'),
        ({"model": "flux-dev", "policy": "first:900"}, 'policy: got "first:900", want at most the model\'s 57'),
        ({"model": "flux-dev", "policy": "some"}, 'policy: got "some"'),
        ({"model": "flux-dev", "policy": "none", "offload": ("block_inputs",)}, "offload: got block_inputs"),
        ({"model": "flux-dev", "replica": True}, "replica: got True"),
        ({"model": "flux-dev", "micro_batch": 13}, "micro_batch: got 13, want at most"),
        ({"model": "flux-dev", "attention": "xformers9"}, 'backend: got "xformers9"'),
        ({"model": "flux-dev", "gpu_gib": float("nan")}, "gpu_gib: got nan"),
    ],
)
def test_bad_input(given: dict[str, object], message: str) -> None:
    if "height" not in given:
        given = given | {"height": 256, "width": 256}
    with pytest.raises(ValueError, match=message):
        plan(Settings(**given), advise=False)  # type: ignore[arg-type]  # wrong on purpose


def test_the_package_loads_no_diffusers() -> None:
    code = "import sys, dancegrpo_fast.memory as m; m.Settings; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
