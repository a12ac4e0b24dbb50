"""The first use of block ops on a device, looked at by the ops themselves, in transformers of every family."""

import json
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import dancegrpo_fast as dgf
from dancegrpo_fast.ops import selfcheck

from .targets import GPU_TARGETS, Target

if find_spec("diffusers"):
    from ..patch import models

    FAMILIES = tuple(models.TINY)
else:
    FAMILIES = ()

ON_GPU = [t for t in GPU_TARGETS if t.values[0].backend == "triton"]


@pytest.mark.skipif(not FAMILIES, reason="diffusers is not installed")
@pytest.mark.parametrize("target", ON_GPU)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_lossless_mode(target: Target, name: str, record_property: Callable) -> None:
    """Forward and backward of each op that it runs are looked at, and pass."""
    model = models.TINY[name].model(torch.bfloat16).to(target.device)
    dgf.accelerate(model, "lossless", backend=target.backend)
    inputs = models.TINY[name].inputs(torch.bfloat16)
    selfcheck.clear()
    models.run(model, {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    checks = selfcheck.records()
    for check in checks:
        found = check._asdict()
        record_property("self check", json.dumps({"family": name, "of": found.pop("op"), **found}))
    assert {check.direction for check in checks} == {"forward", "backward"}
    assert [check for check in checks if not check.passed] == []
