"""Accelerated transformers against diffusers' own: the same bits, or within the budget."""

import copy
import itertools

import pytest
import torch
from torch import nn

import dancegrpo_fast as dgf

from ..release import release_but
from ..tolerances import assert_within_budget
from .models import FAMILIES, TINY, Inputs, assert_gradients_within_budget, assert_same_bits, doubled, run

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtype", release_but((BF16,), [F32, BF16, F16]), ids=str)
@pytest.mark.parametrize("name", TINY)
def test_lossless_changes_no_bit_of_output_or_gradients(name: str, dtype: torch.dtype) -> None:
    model, inputs = TINY[name].model(dtype), TINY[name].inputs(dtype)
    wanted = run(model, inputs)
    for recompute in ("none", "gelu", "all"):
        undo = dgf.accelerate(model, "lossless", recompute=recompute)
        assert_same_bits(run(model, inputs), wanted)
        undo()
    assert_same_bits(run(model, inputs), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_lossless_at_batch_one(name: str) -> None:
    model, inputs = TINY[name].model(BF16), TINY[name].inputs(BF16, 1)
    wanted = run(model, inputs)
    dgf.accelerate(model, "lossless")
    assert_same_bits(run(model, inputs), wanted)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_lossless_under_autocast(name: str, dtype: torch.dtype) -> None:
    """float32 weights, products in bfloat16: the usual way to train with master weights."""
    model, inputs = TINY[name].model(F32), TINY[name].inputs(dtype)
    with torch.autocast("cpu", dtype=BF16):
        wanted = run(model, inputs)
        dgf.accelerate(model, "lossless", recompute="all")
        assert_same_bits(run(model, inputs), wanted)


@pytest.mark.parametrize("dtype", release_but((BF16,), [F32, BF16, F16]), ids=str)
@pytest.mark.parametrize("name", TINY)
def test_fast_is_within_the_budget(name: str, dtype: torch.dtype) -> None:
    model, inputs = TINY[name].model(dtype), TINY[name].inputs(dtype)
    plain, plain_grads = run(model, inputs)
    truth, truth_grads = run(copy.deepcopy(model).double(), doubled(inputs))
    for options in ({}, {"gates_from_weights": True, "recompute": "all"}):
        undo = dgf.accelerate(model, "fast", **options)
        output, grads = run(model, inputs)
        undo()
        assert_within_budget(output, truth, plain)
        assert_gradients_within_budget(grads, truth_grads, plain_grads)


def _through_checkpoints(model: nn.Module, inputs: Inputs, reentrant: bool) -> tuple[torch.Tensor, dict]:
    """Output and gradients; a reentrant checkpoint finds them by `backward` only."""

    def checkpoint(module: nn.Module, *arguments: object) -> object:
        return torch.utils.checkpoint.checkpoint(module, *arguments, use_reentrant=reentrant)

    model.enable_gradient_checkpointing(checkpoint)
    model.zero_grad()
    output = model(**inputs, return_dict=False)[0]
    output.double().square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_change_no_bit(name: str) -> None:
    model, inputs = TINY[name].model(BF16), TINY[name].inputs(BF16)
    eager = _through_checkpoints(model, inputs, False)
    for mode, recompute in itertools.product(("lossless", "fast"), ("none", "all")):
        undo = dgf.accelerate(model, mode, recompute=recompute)
        model.disable_gradient_checkpointing()
        wanted = run(model, inputs)
        checkpointed = _through_checkpoints(model, inputs, False)
        assert_same_bits(checkpointed, wanted)
        if mode == "lossless":
            assert_same_bits(checkpointed, eager)
        undo()


@pytest.mark.parametrize("name", FAMILIES)
def test_reentrant_checkpoints(name: str) -> None:
    """Their backward runs in other threads, which may sum the weights' gradients in another order."""
    model, inputs = TINY[name].model(BF16), TINY[name].inputs(BF16)
    _, truth = run(TINY[name].model(BF16).double(), doubled(inputs))
    eager, eager_grads = _through_checkpoints(model, inputs, True)
    dgf.accelerate(model, "lossless", recompute="all")
    output, grads = _through_checkpoints(model, inputs, True)
    assert torch.equal(output, eager)
    found = {name: grad for name, grad in eager_grads.items() if grad is not None}
    assert_gradients_within_budget(grads, truth, found)


@pytest.mark.parametrize("mode", ["lossless", "fast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ratio_is_exactly_one_on_policy(name: str, mode: str) -> None:
    """Rollout without gradients, replay with them, with recomputation and under a checkpoint."""
    model = TINY[name].model(F32)
    dgf.accelerate(model, mode, recompute="all")
    inputs = TINY[name].inputs(F32, 4)
    table = dgf.transitions.dance_sde(dgf.transitions.shifted_sigmas(4, 3.0), 0.5)
    latents = inputs["hidden_states"]

    def output() -> torch.Tensor:
        return model(**inputs, return_dict=False)[0].reshape(len(latents), -1)

    flat = torch.randn(output().shape)
    with torch.no_grad():
        step = dgf.transition_step(flat, output(), table, 1, seed=3, sample_ids=torch.arange(4))
    model.enable_gradient_checkpointing()
    loss = dgf.policy_loss(flat, output(), step.latents, table, 1, step.log_prob, torch.tensor([1.0, -1.0, 0.5, 2.0]))
    loss.loss.backward()
    assert torch.equal(loss.ratio, torch.ones(4))
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
