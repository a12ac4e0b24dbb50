"""Cases of the block ops: inputs at real sizes, the contenders of each, and whether they are right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.ops import gated_residual as gated_op
from dancegrpo_fast.ops import gelu_tanh as gelu_op
from dancegrpo_fast.ops import norm_modulate as norm_op
from dancegrpo_fast.ops import qk_norm_rope as rope_op
from dancegrpo_fast.ops._block import MODES, Cost
from tests.tolerances import assert_within_budget

from ...blocks.configurations import CONFIGURATIONS, Sizes
from ...plan import Plan
from . import peers

PASSES = ("forward", "forward + backward")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
HUNYUAN, FLUX, WAN = "HunyuanVideo", "FLUX.1-dev", "Wan 2.1 14B"
SIZES = {c.model: c.sizes for c in CONFIGURATIONS if c.model in (HUNYUAN, FLUX, WAN)}
# Of a dry run.
TINY = Sizes(2, 8, 6, 3)
CONSUMERS = 3

# Outputs of one call.
Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op of one model.

    Attributes:
        op, form: its name, and which of its forms.
        model: whose arithmetic, and whose sizes unless it is a dry run.
        tokens, sizes: of the inputs.
        build: shapes and functions, on a device.
        cost: what the op itself says that it moves.
        seconds: reserved of the run's time, most of it for compiling the peer.
    """

    op: str
    form: str
    model: str
    tokens: int
    sizes: Sizes
    build: Callable[[torch.device, Sizes], "Parts"]
    cost: Cost
    seconds: float = 8.0

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.op}, {self.form}, {self.model}"

    def bytes_minimum(self, what: str) -> int:
        """Each input read once and each output written once by either pass."""
        forward, both = self.cost.bytes_forward, self.cost.bytes_forward + self.cost.bytes_backward
        return forward if what == PASSES[0] else both


@dataclass(frozen=True)
class Parts:
    """Shapes and functions of a case.

    Attributes:
        shapes: of the inputs, each with a dtype.
        eager: the peer.
        ours: the op, given mode and backend.
    """

    shapes: list[tuple[tuple[int, ...], torch.dtype]]
    eager: peers.Peer
    ours: Callable[[str, str], Run]


def _rows(sizes: Sizes, tokens: int, count: int = 1) -> list[Any]:
    return [((1, tokens, sizes.channels), BF16)] * count


def _parameters(sizes: Sizes, count: int, dtype: torch.dtype = BF16) -> list[Any]:
    return [((1, sizes.channels), dtype)] * count


def _vectors(width: int, count: int) -> list[Any]:
    return [((width,), BF16)] * count


def _norm(tokens: int, in_float: bool, device: torch.device, sizes: Sizes) -> Parts:
    norm_dtype = F32 if in_float else None
    peer = peers.norm_modulate_in_float if in_float else peers.norm_modulate

    def ours(mode: str, backend: str) -> Run:
        settings: dict[str, Any] = {"mode": mode, "backend": backend, "norm_dtype": norm_dtype}
        return partial(norm_op.norm_modulate_fanout, consumers=CONSUMERS, **settings)

    shapes = _rows(sizes, tokens) + _parameters(sizes, 2, F32 if in_float else BF16)
    return Parts(shapes, peer(CONSUMERS), ours)


def _gated_norm(tokens: int, in_float: bool, device: torch.device, sizes: Sizes) -> Parts:
    if not in_float:

        def modulated(mode: str, backend: str) -> Run:
            return partial(norm_op.gated_residual_norm_modulate, mode=mode, backend=backend)

        shapes = _rows(sizes, tokens, 2) + _parameters(sizes, 3)
        return Parts(shapes, peers.gated_residual_norm_modulate, modulated)

    def affine(mode: str, backend: str) -> Run:
        def call(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            settings: dict[str, Any] = {"norm_dtype": F32, "mode": mode, "backend": backend}
            return norm_op.gated_residual_norm_modulate(x, y, gate, weight=weight, bias=bias, **settings)

        return call

    shapes = _rows(sizes, tokens, 2) + _parameters(sizes, 1, F32) + _vectors(sizes.channels, 2)
    return Parts(shapes, peers.gated_residual_norm_in_float, affine)


def _gated(tokens: int, in_float: bool, device: torch.device, sizes: Sizes) -> Parts:
    def ours(mode: str, backend: str) -> Run:
        def call(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
            return (gated_op.gated_residual(x, y, gate, mode=mode, backend=backend),)

        return call

    shapes = _rows(sizes, tokens, 2) + _parameters(sizes, 1, F32 if in_float else BF16)
    return Parts(shapes, peers.gated_residual_in_float if in_float else peers.gated_residual, ours)


def tables(rows: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[rows, dim]` in float32, every angle twice."""
    speeds = 10_000.0 ** -torch.linspace(0, 1, dim // 2, device=device)
    angles = torch.outer(torch.arange(rows, device=device, dtype=F32), speeds).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _qk(model: str, joint: bool, device: torch.device, sizes: Sizes) -> Parts:
    image, text, heads, dim = sizes.image, sizes.text, sizes.heads, sizes.head_dim
    settings: dict[str, Any] = {"norm": {HUNYUAN: "head_twice", FLUX: "head", WAN: "token"}[model], "eps": peers.EPS}
    cos, sin = tables(image + text if model == FLUX else image, dim, device)
    lengths = [image if model == WAN else image + text]
    if joint:
        lengths = [text, image] if model == FLUX else [image, text]
    # Each stream's part of the tables.
    parts: list[tuple[Tensor | None, Tensor | None]] = [(cos, sin)]
    if joint:
        parts = [(cos[:text], sin[:text]), (cos[text:], sin[text:])] if model == FLUX else [(cos, sin), (None, None)]
    if model == WAN:
        parts = [(cos[:, 0::2], sin[:, 1::2])]

    def ours(mode: str, backend: str) -> Run:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            given, weights = tensors[: 2 * len(lengths)], tensors[2 * len(lengths) :]
            streams = [
                rope_op.Stream(given[2 * i], given[2 * i + 1], weights[2 * i], weights[2 * i + 1], *part)
                for i, part in enumerate(parts)
            ]
            query, key = rope_op.qk_norm_rope(*streams, **settings, mode=mode, backend=backend)
            assert key is not None
            return query, key

        return call

    peer = {
        HUNYUAN: partial(peers.hunyuan_qk, cos, sin, joint),
        FLUX: partial(peers.flux_qk, cos, sin, joint),
        WAN: partial(peers.wan_qk, cos, sin),
    }[model]()
    shapes: list[Any] = [((1, length, heads, dim), BF16) for length in lengths for _ in range(2)]
    return Parts(shapes + _vectors(heads * dim if model == WAN else dim, 2 * len(lengths)), peer, ours)


def _gelu(tokens: int, prefix: bool, device: torch.device, sizes: Sizes) -> Parts:
    def ours(mode: str, backend: str) -> Run:
        def call(x: Tensor, attended: Tensor | None = None) -> tuple[Tensor, ...]:
            return (gelu_op.gelu_tanh(x, prefix=attended, mode=mode, backend=backend),)

        return call

    shapes: list[Any] = [((1, tokens, 4 * sizes.channels), BF16), *(_rows(sizes, tokens) if prefix else [])]
    return Parts(shapes, peers.gelu_behind if prefix else peers.gelu_tanh, ours)


def cases(dry: bool) -> Iterator[Case]:
    """HunyuanVideo's first, then FLUX's and Wan's."""
    for model in (HUNYUAN, FLUX, WAN):
        sizes = TINY if dry else SIZES[model]
        wan = model == WAN
        image, whole = sizes.image, sizes.image if wan else sizes.image + sizes.text
        shape = (sizes.channels, 2)
        heads = (sizes.heads, sizes.head_dim, 2)
        gelu = (4 * sizes.channels, 2)
        norm = norm_op.cost(1, whole, *shape, consumers=CONSUMERS)
        gated_norm = norm_op.cost(1, image, *shape, gated=True)
        every = [
            Case("norm_modulate", "3 consumers", model, whole, sizes, partial(_norm, whole, wan), norm),
            Case(
                *("gated_residual_norm_modulate", "in a block", model, image, sizes),
                *(partial(_gated_norm, image, wan), gated_norm),
            ),
            Case(
                *("gated_residual", "end of a block", model, whole, sizes),
                *(partial(_gated, whole, wan), gated_op.cost(1, whole, *shape)),
            ),
            Case(
                *("qk_norm_rope", "over tokens" if wan else "single stream", model, whole, sizes),
                *(partial(_qk, model, False), rope_op.cost(1, whole, *heads)),
            ),
        ]
        if not wan:
            # The joint sequence.
            joint = rope_op.cost(1, whole, *heads)
            behind = gelu_op.cost(whole, *gelu, prefix=sizes.channels)
            every += [
                Case("qk_norm_rope", "double stream", model, whole, sizes, partial(_qk, model, True), joint),
                Case(
                    "gelu_tanh", "plain", model, image, sizes, partial(_gelu, image, False), gelu_op.cost(image, *gelu)
                ),
                Case("gelu_tanh", "behind attention", model, whole, sizes, partial(_gelu, whole, True), behind),
            ]
        yield from (replace(case, seconds=0.0) for case in every) if dry else every


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

    @property
    def sets(self) -> int:
        """How many."""
        return len(self.leaves)


def draw(parts: Parts, plan: Plan) -> Inputs:
    """As many sets as no cache holds."""
    generator = torch.Generator(plan.device).manual_seed(0)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=plan.device, dtype=dtype)

    leaves: list[list[Tensor]] = []
    grads: list[list[Tensor]] = []
    sets = 2
    while len(leaves) < sets:
        leaves.append([random(*each).requires_grad_() for each in parts.shapes])
        with torch.no_grad():
            outputs = parts.eager(*leaves[0])
        grads.append([random(tuple(out.shape), out.dtype) for out in outputs])
        held = sum(t.nbytes for t in (*leaves[0], *grads[0]))
        sets = max(2, -(-plan.rotation_bytes // held))
    different = list(dict.fromkeys(map(id, outputs)))
    return Inputs(leaves, grads, tuple(different.index(id(out)) for out in outputs))


def trained(run: Run) -> Callable[[list[Tensor], list[Tensor]], tuple[Tensor, ...]]:
    """Outputs and all gradients."""

    def call(leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = run(*leaves)
        found = torch.autograd.grad(outputs, leaves, grads)
        return *(out.detach() for out in outputs), *found

    return call


def trained_compiled(
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


def contenders(parts: Parts, inputs: Inputs, backend: str, compiler: str) -> dict[str, dict[str, Any]]:
    """Pass -> name -> call on one input set."""
    compiled = torch.compile(parts.eager, fullgraph=True, dynamic=False, backend=compiler)
    ours = {f"ours, {mode}": parts.ours(mode, backend) for mode in MODES}

    def forward(run: Run) -> Callable[[int], tuple[Tensor, ...]]:
        def call(i: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return run(*inputs.leaves[i % inputs.sets])

        return call

    def both(run: Callable[..., tuple[Tensor, ...]]) -> Callable[[int], tuple[Tensor, ...]]:
        return lambda i: run(inputs.leaves[i % inputs.sets], inputs.grads[i % inputs.sets])

    runs = {"eager": parts.eager, "compile": compiled, **ours}
    training = {name: trained(run) for name, run in runs.items()}
    training["compile"] = trained_compiled(parts.eager, inputs.places, compiler)
    return {
        PASSES[0]: {name: forward(run) for name, run in runs.items()},
        PASSES[1]: {name: both(run) for name, run in training.items()},
    }


def failures(parts: Parts, inputs: Inputs, calls: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The contenders with a result of either pass that is not the op's in float64, and by how much."""
    leaves = [t.detach().double().requires_grad_() for t in inputs.leaves[0]]
    grads = [g.double() for g in inputs.grads[0]]
    truth = trained(parts.ours("fast", "reference"))(leaves, grads)
    del leaves, grads
    plain = calls[PASSES[1]]["eager"](0)
    found = {}
    for name in calls[PASSES[0]]:
        for what in PASSES:
            results = calls[what][name](0)
            try:
                for actual, exact, rounded in zip(results, truth, plain, strict=what == PASSES[1]):
                    assert_within_budget(actual.detach(), exact, rounded.detach())
            except AssertionError as error:
                found[name] = f"{what}: {error}"
    return found
