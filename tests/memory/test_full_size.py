"""Published models at real sizes, against figures that were found by other means."""

import pytest

from dancegrpo_fast.memory import specs
from dancegrpo_fast.memory.trace import trace

from ..tolerances import assert_as_printed

pytest.importorskip("diffusers")
GIB = 2**30


def test_hunyuan_video_at_full_size() -> None:
    spec = specs.resolve("hunyuan-video")
    model = specs.build(spec)
    inputs = specs.inputs(spec, 53, 480, 640)
    found = trace(model, inputs, optimizer="fused")
    assert_as_printed(found.kept_bytes / GIB, "157")
    assert_as_printed(found.peak.bytes / GIB, "253")
    model.enable_gradient_checkpointing()
    found = trace(model, inputs, optimizer="fused")
    assert_as_printed(found.live("forward")["block_inputs"] / GIB, "5.9")
    assert_as_printed(found.peak.bytes / GIB, "105")


def test_stable_diffusion_at_full_size() -> None:
    spec = specs.resolve("sd14")
    model = specs.build(spec)
    inputs = specs.inputs(spec, 1, 512, 512, batch=8)
    assert_as_printed(trace(model, inputs, optimizer="fused").peak.bytes / GIB, "13.5")
    model.enable_gradient_checkpointing()
    assert_as_printed(trace(model, inputs, optimizer="fused").peak.bytes / GIB, "8.2")
