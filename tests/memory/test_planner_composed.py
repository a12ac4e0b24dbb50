"""Composed of few blocks, the planner's figures are those of the whole model."""

from dataclasses import replace

import pytest
import torch

from dancegrpo_fast.activations import checkpointing
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.blocks import Blocks, compose
from dancegrpo_fast.memory.planning.cases import Case, build, kinds_of, resolved
from dancegrpo_fast.memory.planning.decode import Call, decode
from dancegrpo_fast.memory.planning.tiles import set_tile
from dancegrpo_fast.memory.trace.tracer import trace

from ..tolerances import COMPOSED
from .small import case_of

pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("collected_once")


def whole_trace(case: Case, policy: checkpointing.Policy) -> dict[str, float]:
    """Peaks and work of the whole model, traced block by block."""
    spec = resolved(case.spec)
    model = build(case, tuple(kind.blocks for kind in kinds_of(spec)))
    if policy != "none":
        checkpointing.apply(model, policy)
    inputs = specs.inputs(spec, case.frames, case.height, case.width)
    found = trace(model, inputs, train=case.train, attention=case.kernel)
    phases = ("forward", "backward") if case.train else ("rollout",)
    peaks = {phase: float(found.peak_of(phase).bytes) for phase in phases}
    return peaks | {f"flops {phase}": float(sum(found.flops_by_group[phase].values())) for phase in phases}


def composed(blocks: Blocks, train: bool = True) -> dict[str, float]:
    phases = ("forward", "backward") if train else ("rollout",)
    peaks = {phase: float(sum(blocks.peak(phase).bytes.values())) for phase in phases}
    return peaks | {f"flops {phase}": float(sum(blocks.flops(phase).values())) for phase in phases}


SHIPPED = ["flux-dev", "sd35-medium", "wan21-1.3b"]
SHIPPED += ["z-image", "flux2-dev", "chroma", "wan22-5b", "hunyuan-video-15", "ltx-video", "ltx-2"]
SHIPPED += ["cogvideox-2b", "cogvideox-5b"]


# A folder's few blocks, and a shipped model's that share a sample's tokens, are compared in `make test` too.
@pytest.mark.release
@pytest.mark.parametrize("model", SHIPPED)
def test_few_blocks_say_what_all_do(model: str) -> None:
    spec = specs.resolve(model)
    case = case_of(model, 512, frames=spec.compression[0] + 1 if spec.is_video else 1)
    assert composed(compose(case, "full")) == pytest.approx(whole_trace(case, "full"), rel=COMPOSED)


@pytest.mark.release
def test_mixed_policies_are_composed_of_their_ladders() -> None:
    case = case_of("flux-dev", 512, lora=16, lora_dtype="fp32")
    policies = ["full"] * 10 + ["none"] * 20 + ["attention"] * 27
    found = composed(compose(case, list(policies)))
    assert found == pytest.approx(whole_trace(case, checkpointing.PerBlock(tuple(policies))), rel=COMPOSED)


def test_rollout_is_composed_too() -> None:
    case = replace(case_of("flux-dev", 512), train=False)
    assert composed(compose(case, "none"), False) == pytest.approx(whole_trace(case, "none"), rel=COMPOSED)


def test_tiles_are_traced_once() -> None:
    """Against the decode that runs every tile."""
    call = Call("flux-dev", 1, 768, 1024, 1, tile=512)
    found = decode(call)
    vae = specs.build_vae(specs.resolve("flux-dev"))
    set_tile(vae, 512)
    z = torch.empty(1, 16, 96, 128, dtype=torch.bfloat16, device="meta")
    whole = trace(vae, {"z": z, "return_dict": False}, train=False, call=vae.decode)
    assert found.weights + sum(found.peak.values()) == pytest.approx(whole.peak.bytes, rel=COMPOSED)
    assert sum(found.peak.values()) < sum(decode(replace(call, tile=None)).peak.values())


@pytest.mark.release
def test_tiles_of_a_video_are_traced_once_frame_by_frame() -> None:
    call = Call("wan21-1.3b", 9, 128, 192, 1, tile=128)
    vae = specs.build_vae(specs.resolve("wan21-1.3b"))
    set_tile(vae, 128)
    z = torch.empty(1, 16, 3, 16, 24, dtype=torch.bfloat16, device="meta")
    whole = trace(vae, {"z": z, "return_dict": False}, train=False, call=vae.decode)
    found = decode(call)
    assert found.weights + sum(found.peak.values()) == pytest.approx(whole.peak.bytes, rel=COMPOSED)
