"""What the ops of transformer blocks are measured on: bfloat16 at batch 1, the sizes of `bench.blocks`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.blocks.configurations import CONFIGURATIONS, Sizes
from bench.blocks.count import Traffic
from bench.place import Place, place_of
from bench.turns import Contest, cross
from dancegrpo_fast.ops._block import MODES, Cost
from tests.tolerances import assert_within_budget

from .block_peers import Peer

FORWARD, BOTH = "forward", "forward + backward"
BF16, F32 = torch.bfloat16, torch.float32
HUNYUAN, FLUX, WAN = "HunyuanVideo", "FLUX.1-dev", "Wan 2.1 14B"
SIZES = {c.model: c.sizes for c in CONFIGURATIONS if c.model in (HUNYUAN, FLUX, WAN)}
# Of a dry run.
TINY = Sizes(2, 8, 6, 3)
Shapes = list[tuple[tuple[int, ...], torch.dtype]]
# Outputs of one call.
Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Parts:
    """Of a case: shapes of the inputs, the peer, the op given mode and backend, and what it says that it moves.

    `rounded` is the peer whose errors count, where the op rounds what the other has in float32.
    """

    shapes: Shapes
    eager: Peer
    ours: Callable[[str, str], Run]
    cost: Cost
    tokens: int
    rounded: Peer | None = None


@dataclass(frozen=True)
class Case:
    """One form of one op, in one model's arithmetic and sizes, one way."""

    form: str
    model: str
    way: str
    rank: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.form}, {self.model}, {self.way}"

    def sizes(self, place: Place) -> Sizes:
        """The model's, unless it is a dry run."""
        return TINY if place.dry else SIZES[self.model]


def generate(metafunc: pytest.Metafunc, *forms: tuple[str, str]) -> None:
    """Form and model pairs, each way; HunyuanVideo's come first, as time may run out."""
    place = place_of(metafunc.config.getoption("--device"))
    found = []
    for form, model in forms:
        rank, marks = (0, []) if model == HUNYUAN else (2, [pytest.mark.full])
        found += [pytest.param(Case(form, model, way, rank), marks=marks) for way in (FORWARD, BOTH)]
    contenders = ["eager", "compile", *(f"ours, {mode}" for mode in MODES)]
    cross(metafunc, found if place.blocks else [], contenders, "block ops are Triton's, and measured on a GPU")


def rows(sizes: Sizes, tokens: int, count: int = 1) -> Shapes:
    """Of tokens."""
    return [((1, tokens, sizes.channels), BF16)] * count


def parameters(sizes: Sizes, count: int, dtype: torch.dtype = BF16) -> Shapes:
    """A row of modulation each."""
    return [((1, sizes.channels), dtype)] * count


def vectors(width: int, count: int) -> Shapes:
    """Weights of a norm."""
    return [((width,), BF16)] * count


class _Given(torch.autograd.Function):
    """Hands the outputs their gradients, so that a compiled backward adds those of one tensor's consumers itself."""

    @staticmethod
    def forward(ctx: Any, places: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.places, ctx.count = places, max(places) + 1
        ctx.save_for_backward(*tensors[ctx.count :])
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        totals: list[Any] = [None] * ctx.count
        for place, each in zip(ctx.places, ctx.saved_tensors, strict=True):
            totals[place] = each if totals[place] is None else totals[place] + each
        return None, *totals, *[None] * len(ctx.places)


@dataclass
class Inputs:
    """Several sets of leaves, and the gradients of the outputs; `places` says which outputs are one tensor."""

    leaves: list[list[Tensor]]
    grads: list[list[Tensor]]
    places: tuple[int, ...]


def draw(parts: Parts, place: Place) -> Inputs:
    """As many sets as no cache holds."""
    generator = torch.Generator(place.device).manual_seed(0)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=place.device, dtype=dtype)

    leaves: list[list[Tensor]] = []
    grads: list[list[Tensor]] = []
    sets = 2
    while len(leaves) < sets:
        leaves.append([random(*each).requires_grad_() for each in parts.shapes])
        with torch.no_grad():
            outputs = parts.eager(*leaves[0])
        grads.append([random(tuple(out.shape), out.dtype) for out in outputs])
        held = sum(t.nbytes for t in (*leaves[0], *grads[0]))
        sets = max(2, -(-place.rotation_bytes // held))
    different = list(dict.fromkeys(map(id, outputs)))
    return Inputs(leaves, grads, tuple(different.index(id(out)) for out in outputs))


def trained(run: Run) -> Callable[[list[Tensor], list[Tensor]], tuple[Tensor, ...]]:
    """Outputs and all gradients."""

    def call(leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = run(*leaves)
        found = torch.autograd.grad(outputs, leaves, grads)
        return *(out.detach() for out in outputs), *found

    return call


def _trained_compiled(
    run: Run, places: tuple[int, ...], compiler: str
) -> Callable[[list[Tensor], list[Tensor]], tuple[Tensor, ...]]:
    """The same with a graph each way, the consumers' gradients added in the backward one."""

    def forward(leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = run(*leaves)
        different = [outputs[places.index(i)] for i in range(max(places) + 1)]
        return _Given.apply(places, *different, *grads), *(out.detach() for out in outputs)

    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=compiler)

    def call(leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        tie, *outputs = compiled(leaves, grads)
        return *outputs, *torch.autograd.grad(tie, leaves)

    return call


def _calls(case: Case, place: Place, parts: Parts, inputs: Inputs) -> dict[str, Callable[[int], tuple[Tensor, ...]]]:
    """Contender -> call on one input set."""
    assert place.blocks is not None
    sets = len(inputs.leaves)
    ours = {f"ours, {mode}": parts.ours(mode, place.blocks) for mode in MODES}
    if case.way == BOTH:
        compiled = _trained_compiled(parts.eager, inputs.places, place.compiler)
        training = {"eager": trained(parts.eager), "compile": compiled, **{n: trained(run) for n, run in ours.items()}}

        def both(run: Any) -> Callable[[int], tuple[Tensor, ...]]:
            return lambda i: run(inputs.leaves[i % sets], inputs.grads[i % sets])

        return {name: both(run) for name, run in training.items()}
    eager = torch.compile(parts.eager, fullgraph=True, dynamic=False, backend=place.compiler)

    def forward(run: Run) -> Callable[[int], tuple[Tensor, ...]]:
        def call(i: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return run(*inputs.leaves[i % sets])

        return call

    return {name: forward(run) for name, run in {"eager": parts.eager, "compile": eager, **ours}.items()}


def contest_of(op: str, case: Case, place: Place, parts: Parts) -> Contest:
    """The op in both modes against diffusers' arithmetic in eager torch, and compiled."""
    inputs = draw(parts, place)
    calls, traffic = _calls(case, place, parts, inputs), Traffic()
    truth: list[tuple[Tensor, ...]] = []
    with traffic:
        calls["eager"](0)

    def check(name: str) -> None:
        """The op's own formula in float64 is the truth."""
        if not truth:
            leaves = [t.detach().double().requires_grad_() for t in inputs.leaves[0]]
            wide = trained(parts.ours("fast", "reference"))(leaves, [g.double() for g in inputs.grads[0]])
            truth.extend([wide, trained(parts.rounded or parts.eager)(inputs.leaves[0], inputs.grads[0])])
        for actual, exact, plain in zip(calls[name](0), *truth, strict=case.way == BOTH):
            assert_within_budget(actual.detach(), exact, plain.detach())

    def moved(name: str) -> tuple[int, int | None]:
        least = parts.cost.bytes_forward + (parts.cost.bytes_backward if case.way == BOTH else 0)
        return least, {"eager": traffic.tally.bytes, "compile": None}.get(name, least)

    facts = {"op": op, "form": case.form, "model": case.model, "pass": case.way, "batch": 1, "tokens": parts.tokens}
    facts |= {"channels": case.sizes(place).channels, "output_dtype": "bfloat16", "source": "measured"}
    sets = len(inputs.leaves)
    return Contest(calls, check, lambda name: facts, place.clock(sets), moved, sets)
