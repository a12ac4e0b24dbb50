"""A frozen linear layer under float32 LoRA layers, as they are trained: gradients of x, A and B."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.place import Place
from bench.turns import Contest
from dancegrpo_fast.kernels.lora_linear import reference
from dancegrpo_fast.ops import lora_linear as op
from dancegrpo_fast.ops._block import Cost

from .block_inputs import BF16, F32, FLUX, HUNYUAN, Case, Parts, Run, Shapes, contest_of, generate, rows

RANK, SCALE = 32, 2.0
SQUARE, WIDE, NARROW = "LoRA of to_q", "LoRA of the first layer", "LoRA of the last layer"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One of attention's layers, and those of the feed-forward, which are four times as wide on one side."""
    generate(metafunc, *((form, model) for model in (HUNYUAN, FLUX) for form in (SQUARE, WIDE, NARROW)))


def test_lora_linear(case: Case, place: Place, contest: Any) -> None:
    """All tokens."""
    contest(lambda: _lora(case, place))


def _lora(case: Case, place: Place) -> Contest:
    sizes = case.sizes(place)
    tokens, c = sizes.image + sizes.text, sizes.channels
    inputs, outputs = {SQUARE: (c, c), WIDE: (c, 4 * c), NARROW: (4 * c, c)}[case.form]
    generator = torch.Generator(place.device).manual_seed(1)
    weight, bias = (
        torch.randn(shape, generator=generator, device=place.device, dtype=BF16) / inputs**0.5
        for shape in ((outputs, inputs), (outputs,))
    )

    def base(x: Tensor) -> tuple[Tensor, Tensor]:
        return weight.to(x.dtype), bias.to(x.dtype)

    def eager(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (reference.lora_linear(x, *base(x), a, b, SCALE / inputs),)

    def rounded(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return eager(x, a.to(x.dtype), b.to(x.dtype))

    def ours(mode: str, backend: str) -> Run:
        def call(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return (op.lora_linear(x, *base(x), a, b, scale=SCALE / inputs, mode=mode),)

        return call

    shapes: Shapes = rows(sizes, tokens) if inputs == c else [((1, tokens, inputs), BF16)]
    shapes = [*shapes, ((RANK, inputs), F32), ((outputs, RANK), F32)]
    product = 2 * (tokens * (inputs + outputs) + inputs * outputs)
    flops = 2 * tokens * inputs * outputs
    added = op.cost(tokens, inputs, outputs, RANK, 2)
    whole = Cost(
        added.flops_forward + flops,
        added.flops_backward + flops,
        added.bytes_forward + product,
        added.bytes_backward + product,
        added.bytes_saved,
    )
    return contest_of("lora_linear", case, place, Parts(shapes, eager, ours, whole, tokens, rounded))
