"""`torch.compile(fullgraph=True)` of a model and an op, autograd through both, and checkpointing."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dancegrpo_fast import policy_loss, transition_step

from ..ops.cases import F32, TABLES, Case, assert_same_bits, make_case
from .targets import GPU_TARGETS, HOST_TARGETS, Target, at_home, on, on_every_target, on_gpu_targets

TABLE = TABLES["flow"]
SIZE = 64


class Model(torch.nn.Module):
    """One product an element: a compiler has no other way to round it."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.linspace(-1.0, 1.0, SIZE, device=target.device))

    def forward(self, latents: Tensor) -> Tensor:
        return latents * self.scale


def rollout(model: Model, case: Case, target: Target, step: int | Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        settings = {"seed": 3, "sample_ids": case.sample_ids, "backend": target.backend}
        found = transition_step(case.latents, model(case.latents), TABLE, step, **settings)
    return {"latents": found.latents, "log_prob": found.log_prob}


def replay(model: Model, case: Case, target: Target, step: int | Tensor) -> dict[str, Tensor]:
    given = replace(case, step=step).lost(TABLE, model(case.latents))
    result = policy_loss(*given, weight=case.weight, backend=target.backend)
    return {"loss": result.loss, "ratio": result.ratio}


def case_on(target: Target) -> Case:
    return on(make_case((4, 40, SIZE), TABLE, (F32, F32, F32)), target)


# The CPU tests of the ops have Inductor.
COMPILED = [
    pytest.param(t.values[0], compiler, marks=t.marks, id=f"{t.id}-{compiler}")
    for targets, compilers in ((HOST_TARGETS, ["aot_eager"]), (GPU_TARGETS, ["aot_eager", "inductor"]))
    for t in targets
    for compiler in compilers
]


@pytest.mark.parametrize(("target", "compiler"), COMPILED)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("part", [rollout, replay])
def test_a_model_and_an_op_in_one_graph(target: Target, part, per_sample: bool, compiler: str) -> None:
    model, case = Model(target), case_on(target)
    step = torch.tensor([2, 0, 1, 3], device=target.device) if per_sample else 1
    wanted = part(model, case, target, step)
    torch._dynamo.reset()
    found = torch.compile(part, fullgraph=True, backend=compiler)(model, case, target, step)
    assert_same_bits(at_home(found), at_home(wanted))
    if "loss" in found:
        torch.testing.assert_close(*(torch.autograd.grad(r["loss"], model.scale)[0] for r in (found, wanted)))


@on_every_target
def test_gradients_reach_the_model(target: Target) -> None:
    """As from the C++ kernels, up to the products' own roundings."""
    here = Target("cpu", "cpu")
    gradients = []
    for where in (here, target):
        model = Model(where)
        replay(model, case_on(where), where, 1)["loss"].backward()
        gradients.append(model.scale.grad.cpu())
    torch.testing.assert_close(*gradients)


@on_every_target
def test_checkpointing_repeats_the_bits(target: Target) -> None:
    model, case = Model(target), case_on(target)
    plain = replay(model, case, target, 1)["loss"]
    again = checkpoint(lambda: replay(model, case, target, 1)["loss"], use_reentrant=False)
    gradients = [torch.autograd.grad(loss, model.scale)[0] for loss in (plain, again)]
    assert torch.equal(plain, again) and torch.equal(*gradients)


@on_gpu_targets
def test_cuda_graph_trees_own_nothing_of_ours(target: Target) -> None:
    """`reduce-overhead` refuses memory that outlives a call and is none of its outputs."""
    model, case = Model(target), case_on(target)
    for part in (rollout, replay):
        wanted = part(model, case, target, 1)
        if target.backend == "triton":
            # What is kept for a stream is made anew, by the first run on one of the graphs'.
            importlib.import_module("dancegrpo_fast.ops._triton")._workspaces.clear()
        torch._dynamo.reset()
        run = torch.compile(part, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = {name: value.detach().clone() for name, value in run(model, case, target, 1).items()}
        assert_same_bits(at_home(found), at_home(wanted))
