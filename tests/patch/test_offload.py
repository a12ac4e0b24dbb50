"""Accelerated models whose weights accelerate's hooks bring in for one call at a time."""

import pytest
import torch

import dancegrpo_fast as dgf
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope

from ..release import release_but
from . import models

hooks = pytest.importorskip("accelerate")


@pytest.mark.parametrize("gates_from_weights", [False, True])
@pytest.mark.parametrize("name", release_but(models.FAMILIES, models.TINY))
def test_offloaded_weights_are_used_and_go_again(name: str, gates_from_weights: bool) -> None:
    """Norms whose modules are never called among them."""
    tiny = models.TINY[name]
    model, inputs = tiny.model(), tiny.inputs()
    mode = "fast" if gates_from_weights else "lossless"
    dgf.accelerate(model, mode, trim_text=False, gates_from_weights=gates_from_weights)
    with torch.no_grad():
        wanted = model(**inputs, return_dict=False)[0]
    hooks.cpu_offload(model, execution_device=torch.device("cpu"))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = model(**inputs, return_dict=False)[0]
        assert torch.equal(found.detach(), wanted)
        assert all(p.is_meta for p in model.parameters())


def test_weights_that_nothing_brings_are_refused() -> None:
    query, weight = torch.zeros(1, 2, 3, 4), torch.empty(4, device="meta")
    text = "stream.q_weight: got a tensor on meta, .*; whoever offloaded it must put it back before the block is called"
    with pytest.raises(ValueError, match=text):
        qk_norm_rope(Stream(query, q_weight=weight))
