"""The first use of block ops on a device, looked at by the ops themselves, in transformers of every family."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dancegrpo_fast as dgf
from dancegrpo_fast.ops import selfcheck

from ..patch import models
from .targets import Target
from .test_block_ops import ON_GPU


@pytest.mark.parametrize("target", ON_GPU)
@pytest.mark.parametrize("name", models.TINY)
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
