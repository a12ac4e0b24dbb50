"""Published models at real sizes, against figures that were found by other means."""

import pytest

from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.trace.tracer import trace

from ..tolerances import assert_as_printed

pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("collected_once")
GIB = 2**30


@pytest.mark.release
def test_hunyuan_video_at_full_size() -> None:
    spec = specs.resolve("hunyuan-video")
    model = specs.build(spec)
    inputs = specs.inputs(spec, 53, 480, 640)
    found = trace(model, inputs, optimizer="fused")
    assert_as_printed(found.kept_bytes / GIB, "157")
    assert_as_printed(found.peak.bytes / GIB, "253")
