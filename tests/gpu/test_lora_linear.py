"""A linear layer with a LoRA update on a device: peft's bits, its budget, nothing that waits, graphs.

Where there is no GPU the same bodies run on the CPU, so that they are known to run.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.kernels.lora_linear import reference
from dancegrpo_fast.ops.lora_linear import lora_linear

from ..ops.cases import BF16, F16, F32
from ..tolerances import assert_within_budget
from .targets import GPU_TARGETS, Target, assert_nothing_waits, captured

HOST = pytest.param(Target("cpu", "reference"), id="reference")
on_every_target = pytest.mark.parametrize(
    "target", [HOST, *(t for t in GPU_TARGETS if t.values[0].backend == "triton")]
)
DTYPES = [(BF16, F32), (BF16, BF16), (F16, F32), (F32, F32)]
ROWS, K, N, RANK = 261, 96, 136, 8
Run = Callable[..., Tensor]


def draw(target: Target, dtype: torch.dtype, lora: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, ROWS, K), (N, K), (N,), (RANK, K), (N, RANK))
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    dtypes = (dtype, dtype, dtype, lora, lora)
    return [
        t.to(target.device, d).requires_grad_(i > 2 or not i)
        for i, (t, d) in enumerate(zip(found, dtypes, strict=True))
    ]


def run(call: Run, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients of x, A and B, where two layers read x."""
    x, *rest = tensors
    shared = x * 1
    outputs = call(shared, *rest), call(shared, *rest)
    grad = outputs[0].detach().roll(1, -1)
    return [outputs[0].detach(), *torch.autograd.grad(outputs, [x, *rest[2:]], (grad, grad * 0.5))]


def eager(scale: float) -> Run:
    return lambda *tensors: reference.lora_linear(*tensors, scale)


@on_every_target
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
def test_lossless_has_the_bits_of_peft(target: Target, scale: float) -> None:
    for dtypes in DTYPES:
        tensors = draw(target, *dtypes)
        found = run(lambda *t: lora_linear(*t, scale=scale, mode="lossless"), tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, run(eager(scale), tensors), strict=True)), dtypes


@on_every_target
def test_fast_is_within_the_budget(target: Target) -> None:
    for dtypes in DTYPES:
        tensors = draw(target, *dtypes)
        doubled = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        plain = run(lambda x, w, b, *ab: eager(0.3)(x, w, b, *(t.to(x.dtype) for t in ab)), tensors)
        results = run(lambda *t: lora_linear(*t, scale=0.3), tensors), run(eager(0.3), doubled), plain
        for actual, truth, rounded in zip(*results, strict=True):
            assert_within_budget(actual.cpu(), truth.cpu(), rounded.cpu())


@on_every_target
@pytest.mark.parametrize("mode", ["lossless", "fast"])
def test_nothing_waits_and_graphs_capture_it(target: Target, mode: str) -> None:
    tensors = draw(target, BF16, F32)

    def call() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"out": lora_linear(*tensors, scale=0.3, mode=mode)}

    wanted = call()["out"].clone()
    assert_nothing_waits(target, [call, lambda: run(lambda *t: lora_linear(*t, scale=0.3, mode=mode), tensors)])
    found, replay = captured(target, call)
    replay()
    assert torch.equal(found["out"], wanted)
