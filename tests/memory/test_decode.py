"""The VAE's decode: what others measured on GPUs, what a CPU takes, tiles, and what CUDA's allocator holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.gpu.memory.vaes import Decoder
from bench.memory import ledger
from dancegrpo_fast.activations import operators
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.decode import Call, decode
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.settings import GIB, Settings
from dancegrpo_fast.memory.planning.tiles import rule, set_tile, tile_of
from dancegrpo_fast.memory.trace.allocator import MIB, reserved_bytes
from dancegrpo_fast.memory.trace.result import Storage, Trace
from dancegrpo_fast.memory.trace.tracer import trace

from ..models.parts import flux_transformer
from ..release import release_but
from ..tolerances import PREDICTED_BYTES, PUBLISHED

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("collected_once")

HALF = "float16"
# GiB that torch allocated on GPUs, weights among them, in public tables; nothing was fitted to them but that large
# outputs are not copied, which FLUX's 16 pictures say.
INVOKE = "github.com/invoke-ai/InvokeAI/pull/9305, RTX 4090, torch 2.7.1"
TORCHAO = "github.com/sayakpaul/diffusers-torchao, H100: less the pipeline's 31.44, with the VAE's 0.16"
CACHE_DIT = "github.com/vipshop/cache-dit/pull/645, L20: less the pipeline's 31.44, with the VAE's 0.16"
BLOG = "huggingface.co/blog/video_gen, A100, nf4, every model offloaded while it is idle"
MEASURED = {
    "qwen-image 512": (Call("qwen-image", 1, 512, 512, 1, dtype=HALF), 1.274, INVOKE),
    "qwen-image 768": (Call("qwen-image", 1, 768, 768, 1, dtype=HALF), 2.563, INVOKE),
    "qwen-image 1024": (Call("qwen-image", 1, 1024, 1024, 1, dtype=HALF), 4.369, INVOKE),
    "qwen-image 1088 x 1920": (Call("qwen-image", 1, 1088, 1920, 1, dtype=HALF), 8.468, INVOKE),
    "qwen-image 2048": (Call("qwen-image", 1, 2048, 2048, 1, dtype=HALF), 16.754, INVOKE),
    "flux-dev 1024": (Call("flux-dev", 1, 1024, 1024, 1), 33.851 - 31.438 + 0.156, TORCHAO),
    "flux-dev 1024, 8": (Call("flux-dev", 1, 1024, 1024, 8), 47.51 - 31.44 + 0.156, TORCHAO),
    "flux-dev 1024, 16": (Call("flux-dev", 1, 1024, 1024, 16), 61.55 - 31.44 + 0.156, TORCHAO),
    "flux-dev 2048": (Call("flux-dev", 1, 2048, 2048, 1), 40.96 - 31.44 + 0.156, CACHE_DIT),
    "hunyuan-video 121 x 512 x 768": (Call("hunyuan-video", 121, 512, 768, 1, dtype=HALF), 21.99, BLOG),
}
# Encodes of Qwen-Image's VAE in float16, from the same table.
ENCODED = {512: 0.900, 768: 1.724, 1024: 2.879, 1536: 6.179}
# cuDNN takes other algorithms for these, without the one copy or the other.
HIGH = Call("flux-dev", 1, 1024, 1024, 4), 39.49 - 31.44 + 0.156, TORCHAO
# GiB that torch reserved, weights among them.
RESERVED = {
    "qwen-image 1024": (Call("qwen-image", 1, 1024, 1024, 1, dtype=HALF), 5.254 + 0.236, INVOKE),
    "sd14 1024 in float32": (Call("sd14", 1, 1024, 1024, 1, dtype="float32"), 0.355 * 23.99, "SDXL, diffusers' docs"),
}
# The allocator begins empty here, and a process has run before there.
ABOUT = 0.05


@pytest.mark.parametrize("name", release_but(("qwen-image 512", "flux-dev 1024"), MEASURED))
def test_decodes_take_what_others_measured(name: str) -> None:
    call, gib, _ = MEASURED[name]
    found = decode(call)
    assert (found.weights + sum(found.peak.values())) / GIB == pytest.approx(gib, rel=PUBLISHED)


@pytest.mark.parametrize("side", release_but((512,), ENCODED))
def test_encodes_take_it_too(side: int) -> None:
    """Convolutions with strides, of which no decode has any."""
    vae: Any = specs.build_vae(specs.resolve("qwen-image"), torch.float16)
    picture = torch.empty(1, 3, 1, side, side, dtype=torch.float16, device="meta")
    found = trace(vae, {"x": picture, "return_dict": False}, train=False, call=vae.encode)
    assert found.peak.bytes / GIB == pytest.approx(ENCODED[side], rel=PUBLISHED)


@pytest.mark.release
def test_four_pictures_are_planned_too_high() -> None:
    call, gib, _ = HIGH
    found = decode(call)
    assert 1.15 * gib < (found.weights + sum(found.peak.values())) / GIB < 1.2 * gib


@pytest.mark.release
@pytest.mark.parametrize("name", RESERVED)
def test_and_what_the_allocator_reserved(name: str) -> None:
    call, gib, _ = RESERVED[name]
    found = decode(call)
    assert (found.weights + found.reserved) / GIB == pytest.approx(gib, rel=ABOUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE whose convolutions oneDNN computes."""
    found = tmp_path_factory.mktemp("vae")
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=256,
    )
    vae.save_pretrained(found / "vae")
    flux_transformer(8).save_pretrained(found / "transformer")
    return found


@pytest.mark.parametrize("tile", [None, 64])
def test_a_cpu_takes_what_is_planned(folder: Path, tile: int | None) -> None:
    """By torch's own allocator, within operators too."""
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    set_tile(vae, tile)
    z = torch.randn(1, 4, 64, 64)
    taken = ledger.measure(Decoder(vae), {"z": z}, train=False)
    found = decode(Call(str(folder), 1, 128, 128, 1, tile, "float32", "cpu"))
    beside = taken.allocator_peak - taken.fixed + z.nbytes
    assert sum(found.peak.values()) == pytest.approx(beside, rel=PREDICTED_BYTES)
    assert found.peak["workspace"] > 0.2 * beside


def test_a_convolution_is_counted_with_its_copies() -> None:
    layer = nn.Conv2d(12, 24, 3, padding=1, bias=False).requires_grad_(False)
    found = trace(layer, {"input": torch.empty(2, 12, 10, 10)}, train=False)
    # Channels in multiples of 8.
    copies = 4 * (2 * 100 * 16 + 2 * 100 * 24 + 24 * 12 * 9)
    assert found.peak.by_category["workspace"] == copies
    on_cpu = trace(layer, {"input": torch.empty(2, 12, 10, 10)}, train=False, attention="cpu")
    assert "workspace" not in on_cpu.peak.by_category
    last = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as its own documentation has it
    assert "workspace" not in trace(last, {"input": torch.empty(2, 12, 10, 10)}, train=False).peak.by_category
    assert operators.workspace(torch.ops.aten.add.Tensor, (), None) == 0


def lives(*sizes: tuple[int, int, int]) -> Trace:
    """Storages of so many bytes, each born and dead at these events."""
    found = []
    for size, born, died in sizes:
        storage = Storage(size, "aten.empty", "", "rollout", born, "temporaries", False)
        storage.died = died
        found.append(storage)
    return Trace(found, {"rollout": (0, 2 * len(found))}, {}, {}, {}, {})


def test_the_allocator_keeps_splits_and_joins() -> None:
    # Small ones share 2 MiB, medium ones 20, large ones have what they ask for in steps of 2.
    assert reserved_bytes(lives((600, 0, 2), (1024, 1, 3))) == 2 * MIB
    assert reserved_bytes(lives((2 * MIB, 0, 2), (3 * MIB, 1, 3))) == 20 * MIB
    assert reserved_bytes(lives((31 * MIB, 0, 1))) == 32 * MIB
    # A freed block of 30 MiB serves 20, and what is left of it 8; then they are one again.
    again = lives((30 * MIB, 0, 1), (20 * MIB, 2, 4), (8 * MIB, 3, 5), (30 * MIB, 6, 7))
    assert reserved_bytes(again) == 30 * MIB
    # A larger one needs its own.
    assert reserved_bytes(lives((30 * MIB, 0, 1), (40 * MIB, 2, 3))) == 70 * MIB


def test_tiles_below_the_vaes_own_and_as_diffusers_makes_them(folder: Path) -> None:
    vae: Any = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    z = torch.randn(2, 4, 64, 96)
    with torch.no_grad():
        whole = vae.decode(z, return_dict=False)[0]
        assert rule(vae).usual(192) == 96 and list(rule(vae).sizes(32)) == [8, 16, 24]
        set_tile(vae, 96)
        assert tile_of(vae) == 96
        tiled = vae.decode(z, return_dict=False)[0]
        assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
        assert torch.equal(tiled, torch.cat([vae.tiled_decode(one).sample for one in z.split(1)]))
        set_tile(vae, None)
        assert tile_of(vae) is None and torch.equal(vae.decode(z, return_dict=False)[0], whole)
    with pytest.raises(ValueError, match="vae_tile: got 20, want a multiple of 8 for AutoencoderKL"):
        set_tile(vae, 20)
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="got tiles for AutoencoderKLTemporalDecoder, want a VAE"),
    ):
        set_tile(diffusers.AutoencoderKLTemporalDecoder(), 64)


@pytest.mark.parametrize(
    "kind",
    release_but(
        ("AutoencoderKLWan",),
        ["AutoencoderKLFlux2", "AutoencoderKLHunyuanVideo15", "AutoencoderKLLTXVideo", "AutoencoderKLWan"],
    ),
)
def test_tiled_pictures_are_as_large_as_whole_ones(kind: str) -> None:
    with torch.device("meta"):
        vae: Any = getattr(diffusers, kind)().eval()
    size = rule(vae).unit
    channels = vae.config.get("z_dim") or vae.config.latent_channels
    scale = vae.config.get("spatial_compression_ratio") or getattr(vae, "spatial_compression_ratio", None) or 8
    latents = torch.empty(
        1, channels, *((1,) if "Flux" not in kind else ()), size // scale * 2, size // scale * 3, device="meta"
    )
    with torch.no_grad():
        whole = vae.decode(latents, return_dict=False)[0]
        set_tile(vae, size)
        assert vae.decode(latents, return_dict=False)[0].shape == whole.shape


def test_auto_takes_the_largest_tiles_that_fit_and_on_tiles_below_the_own(folder: Path) -> None:
    asked = Settings(str(folder), height=128, width=128, lora=4, attention="flash", micro_batch=1, gpu_gib=80.0)
    roomy = Iteration(asked)
    assert roomy.tile is None
    on = Iteration(asked.changed(vae_tiling="on"))
    assert on.tile == 64 and on.decode_bytes(64) < on.decode_bytes(None)
    assert Iteration(asked.changed(vae_tiling="on", vae_tile=96)).tile == 96
    tight = Iteration(asked.changed(gpu_gib=(roomy.decode_bytes(None) - MIB) / GIB))
    assert tight.tile is not None
    limit = tight.settings.gpu_gib * GIB
    assert tight.decode_bytes(tight.tile) <= limit < tight.decode_bytes(tight.tile + 8)
    assert Iteration(tight.settings.changed(vae_tiling="off")).tile is None
    # On another card, other tiles.
    assert tight.at(80.0).tile is None and roomy.at(tight.settings.gpu_gib).tile == tight.tile
    assert any(f"in tiles of {tight.tile} pixels" in reason for reason in tight.reasons)
    with pytest.raises(ValueError, match='vae_tiling: got "on" for pictures of 8 pixels, want larger'):
        Iteration(asked.changed(vae_tiling="on", height=8, width=8))


def test_an_evaluation_of_larger_pictures_is_planned(folder: Path) -> None:
    asked = Settings(str(folder), height=32, width=32, lora=4, attention="flash", checkpointing="none")
    larger = asked.changed(evaluation_height=64, evaluation_width=64)
    iteration = Iteration(larger)
    rollout, decoded = iteration.evaluating()
    assert (rollout.name, decoded.name) == ("evaluation rollout", "evaluation decode")
    training = iteration.decoding()
    assert training is not None and decoded.bytes > training.bytes
    assert rollout.bytes > iteration.rollout().bytes - iteration.trajectories
    assert rollout.seconds == decoded.seconds == 0.0
    # Smaller ones fit where training does.
    assert asked.changed(evaluation_height=16, evaluation_width=16).evaluation is None


def test_what_runs_on_the_device_is_planned(folder: Path) -> None:
    asked = Settings(str(folder), height=128, width=128, lora=4, attention="flash", checkpointing="none")
    runs: dict[str, dict[str, Any]] = {"2.9": {"torch_version": "2.9"}, "2.7": {"torch_version": "2.7"}}
    kept = {}
    for name, changes in (runs | {"cpu": {"device": "cpu"}}).items():
        iteration = Iteration(asked.changed(**changes))
        kept[name] = iteration.training(iteration.pick().blocks)[0].budget["saved"]
    assert kept["2.9"] < kept["2.7"]
    assert kept["cpu"] == pytest.approx(kept["2.7"], rel=PUBLISHED)
    assert Settings("flux-dev", torch_version="2.10.1").fused_norm and not Settings("flux-dev", device="cpu").fused_norm
    with pytest.raises(ValueError, match='torch_version: got "two", want one such'):
        Settings("flux-dev", torch_version="two")
    with pytest.raises(ValueError, match='vae_tile: got 64 with vae_tiling "off"'):
        replace(asked, vae_tile=64, vae_tiling="off")
