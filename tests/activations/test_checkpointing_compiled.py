"""Checkpoint policies with torch.compile."""

from typing import Any

import pytest
import torch

from dancegrpo_fast.activations.checkpointing import FirstBlocks, apply

from ..patch.models import assert_same_bits, run
from ..release import release_but
from .policies import MODELS, build, mixed


def _compiled_blocks(model: Any) -> None:
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="aot_eager")


@pytest.mark.parametrize("offload", [False, True])
def test_compiled_blocks(offload: bool) -> None:
    model = build("wan")
    inputs = MODELS["wan"].inputs()
    _compiled_blocks(model)
    wanted = run(model, inputs)
    for policy in ("full", FirstBlocks(1)):
        undo = apply(model, policy, offload=offload)
        assert_same_bits(run(model, inputs), wanted)
        undo()
    with pytest.raises(ValueError, match="policy: got one that keeps results of single ops, with blocks compiled"):
        apply(model, "attention", offload=offload)


def test_blocks_compiled_after_a_selective_policy() -> None:
    model = build("wan")
    apply(model, "matmul")
    _compiled_blocks(model)
    with pytest.raises(ValueError, match="policy: got one that keeps results of single ops, with blocks compiled"):
        model(**MODELS["wan"].inputs())


@pytest.mark.parametrize("policy", release_but(("mixed",), ["full", "attention", "mixed"]))
def test_model_compiled_as_a_whole(policy: str) -> None:
    model = build("wan")
    inputs = MODELS["wan"].inputs()
    wanted = run(model, inputs)
    apply(model, mixed(model) if policy == "mixed" else policy)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run(compiled, inputs)
    assert torch.equal(found[0], wanted[0])
    for name, grad in wanted[1].items():
        # Compiled graphs may add the gradients of a tensor's uses in another order.
        torch.testing.assert_close(found[1][f"_orig_mod.{name}"], grad)
