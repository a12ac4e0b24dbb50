"""The ops of transformer blocks on a device: parity, bits that must not change, launches, graphs.

Where there is no GPU the same bodies run on the reference, so that they are known to run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate_fanout
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope

from ..ops.cases import BF16, F16, F32, F64, dtype_id
from ..tolerances import assert_within_budget
from .activity import device_activity, ops_that_launch, profiler_sees_kernels
from .targets import GPU_TARGETS, HOST_TARGETS, Target, assert_nothing_waits, captured, stream_of

HOST = pytest.param(Target("cpu", "reference"), id="reference")
INTERPRETED = [t for t in HOST_TARGETS if t.values[0].backend == "triton"]
ON_GPU = [t for t in GPU_TARGETS if t.values[0].backend == "triton"]
on_every_target = pytest.mark.parametrize("target", [HOST, *INTERPRETED, *ON_GPU])
with_both_modes = pytest.mark.parametrize("mode", ["lossless", "fast"])

# Odd everywhere; heads of 10 numbers are no whole access.
SHAPE, HEADS, DIM, TEXT = (3, 21, 261), 3, 10, 4
SPLIT = 8
Dtypes = tuple[torch.dtype, torch.dtype]


@dataclass(frozen=True)
class Op:
    """One call.

    Attributes:
        function: given mode and backend, then the tensors.
        tensors: its inputs that get gradients.
        batched: how many of them, the first ones, have a dimension of samples.
    """

    function: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]
    batched: int

    def on(self, target: Target) -> "Op":
        return replace(self, tensors=tuple(t.to(target.device) for t in self.tensors))

    def to(self, dtype: torch.dtype) -> "Op":
        return replace(self, tensors=tuple(t.to(dtype) for t in self.tensors))


class Draw:
    """Random tensors of the two dtypes, in order."""

    def __init__(self, dtypes: Dtypes, seed: int) -> None:
        self.dtypes, self.generator = dtypes, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, parameter: bool = False) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.dtypes[parameter])

    def parameters(self, shape: tuple[int, ...], rows: int | None) -> Tensor:
        batch, _, channels = shape
        size = (batch, channels) if rows is None else (batch, rows, channels)
        return self(*size, parameter=True)


def norm(
    draw: Draw,
    shape: tuple[int, int, int],
    *,
    gated: bool = False,
    affine: bool = False,
    rows: int | None = None,
    consumers: int = 1,
    **settings: Any,
) -> Op:
    if settings.get("norm_dtype") == F32 and draw.dtypes[1] != F32:
        draw.dtypes = draw.dtypes[0], F32
    streams = [draw(*shape) for _ in range(2 if gated else 1)]
    parameters = [draw.parameters(shape, rows) for _ in range((0 if affine else 2) + gated)]
    vectors = [draw(shape[-1], parameter=True) for _ in range(2 if affine else 0)]

    def call(mode: str, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        options = {**settings, "mode": mode, "backend": backend}
        given = tensors[: len(tensors) - len(vectors)]
        if affine:
            options |= {"weight": tensors[-2], "bias": tensors[-1]}
        if gated:
            return gated_residual_norm_modulate(*given, **options)
        return norm_modulate_fanout(*given, consumers=consumers, **options)

    return Op(call, (*streams, *parameters, *vectors), len(streams) + len(parameters))


def gate(draw: Draw, shape: tuple[int, int, int], *, rows: int | None = None, **settings: Any) -> Op:
    def call(mode: str, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (gated_residual(*tensors, **settings, mode=mode, backend=backend),)

    return Op(call, (draw(*shape), draw(*shape), draw.parameters(shape, rows)), 3)


def angles(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    found = torch.arange(rows * width, dtype=F32, device=device).reshape(rows, width) / 7
    return found.cos(), found.sin()


def rope(
    draw: Draw,
    shape: tuple[int, int, int],
    *,
    streams: int = 2,
    per_pair: bool = False,
    turned: bool = True,
    heads: tuple[int, int] = (HEADS, DIM),
    norm: str = "head",
    **settings: Any,
) -> Op:
    """The first stream is turned but for its last token, the second is not."""
    batch, tokens, _ = shape
    lengths = (tokens, TEXT)[:streams]
    width = heads[0] * heads[1] if norm == "token" else heads[1]
    tensors = [draw(batch, length, *heads) for length in lengths for _ in range(2)]
    weights = [] if norm == "none" else [draw(width, parameter=True) for _ in tensors]

    def call(mode: str, backend: str, *given: Tensor) -> tuple[Tensor, ...]:
        own = given[2 * streams :] or (None,) * (2 * streams)
        table = angles(max(1, tokens - 1), heads[1] // 2 if per_pair else heads[1], given[0].device)
        first = Stream(*given[:2], *own[:2], *(table if turned else ()))
        second = Stream(*given[2:4], *own[2:4]) if streams == 2 else None
        query, key = qk_norm_rope(first, second, norm=norm, **settings, mode=mode, backend=backend)
        assert key is not None
        return query, key

    return Op(call, (*tensors, *weights), len(tensors))


def gelu(draw: Draw, shape: tuple[int, int, int], *, prefix: int = 0) -> Op:
    def call(mode: str, backend: str, x: Tensor, attended: Tensor | None = None) -> tuple[Tensor, ...]:
        return (gelu_tanh(x, prefix=attended, mode=mode, backend=backend),)

    tensors = (draw(*shape), *([draw(*shape[:2], prefix)] if prefix else []))
    return Op(call, tensors, len(tensors))


OPS: dict[str, Callable[..., Op]] = {
    "norm": partial(norm, consumers=3),
    "norm per token": partial(norm, rows=SHAPE[1]),
    "norm in segments": partial(norm, rows=2, split=SPLIT, consumers=2),
    "rms norm with weights": partial(norm, affine=True, norm="rms"),
    "gated norm": partial(norm, gated=True),
    "gated norm in segments": partial(norm, gated=True, rows=2, split=SPLIT),
    "gated norm in float32 with weights": partial(norm, gated=True, affine=True, norm_dtype=F32),
    "gate": gate,
    "gate per token": partial(gate, rows=SHAPE[1]),
    "gate in segments": partial(gate, rows=2, split=SPLIT),
    "rope": partial(rope, streams=1),
    "rope of two streams": partial(rope, norm="head_twice"),
    "rope of halves": partial(rope, rope="half", streams=1),
    "rope over tokens": partial(rope, norm="token", per_pair=True, streams=1, rope_gradient="once"),
    "rope without a norm": partial(rope, norm="none"),
    "gelu": gelu,
    "gelu behind a prefix": partial(gelu, prefix=67),
}
# Kernels that one call starts, and its backward: one a stream, and one for what is summed over tokens.
LAUNCHES = {
    "norm": (1, 2),
    "norm per token": (1, 1),
    "norm in segments": (1, 2),
    "gated norm": (1, 2),
    "gate": (1, 2),
    "gate per token": (1, 1),
    "rope": (1, 2),
    "rope of two streams": (2, 4),
    "rope over tokens": (1, 2),
    "gelu": (1, 1),
    "gelu behind a prefix": (1, 1),
}
# One of each kernel, which stand for the others where a test is of what they share.
FEW = ("norm", "gated norm", "gate", "rope of two streams", "rope over tokens", "gelu behind a prefix")


def make(name: str, target: Target, dtypes: Dtypes = (BF16, BF16), shape: Any = SHAPE, seed: int = 0) -> Op:
    return OPS[name](Draw(dtypes, seed), shape).on(target)


def forward(op: Op, mode: str, backend: str) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Leaves and outputs."""
    leaves = [t.detach().requires_grad_() for t in op.tensors]
    return leaves, op.function(mode, backend, *leaves)


def gradients_for(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What is given to the backward; depends on shapes alone."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=draw, dtype=F32).to(BF16).to(o) for o in outputs]


def results(op: Op, mode: str, backend: str, grads: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs and all gradients; given `grads` nothing comes from the host, which a capture could not copy from."""
    leaves, outputs = forward(op, mode, backend)
    found = torch.autograd.grad(outputs, leaves, gradients_for(outputs) if grads is None else grads)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(found)}


def assert_parity(op: Op, target: Target, mode: str) -> dict[str, Tensor]:
    """Within the budget of eager torch on the same device; gives what was computed."""
    found, plain = results(op, mode, target.backend), results(op, "lossless", "reference")
    truth = results(op.to(F64), "fast", "reference")
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert_within_budget(value, truth[name], plain[name])
    return found


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name, value in wanted.items() if not torch.equal(found[name], value)]
    assert not different, different


class TestParity:
    @on_every_target
    @with_both_modes
    @pytest.mark.parametrize("name", OPS)
    def test_every_op(self, target: Target, name: str, mode: str, record_property: Callable) -> None:
        op = make(name, target)
        found = assert_parity(op, target, mode)
        if mode == "lossless":
            plain = results(op, "lossless", "reference")
            apart = sum(int((found[n] != plain[n]).sum()) for n in found)
            count = sum(value.numel() for value in found.values())
            text = "in a million elements of a lossless block op differ from eager torch"
            record_property(text, apart * 10**6 // count)

    @on_every_target
    @with_both_modes
    @pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (BF16, F32), (F32, BF16)], ids=dtype_id)
    @pytest.mark.parametrize("name", FEW)
    def test_every_dtype(self, target: Target, name: str, dtypes: Dtypes, mode: str) -> None:
        assert_parity(make(name, target, dtypes), target, mode)

    @on_every_target
    @pytest.mark.parametrize("channels", [1, 2, 127, 1023, 1025, 3072, 4097, 5120])
    @pytest.mark.parametrize("name", ["norm", "gated norm", "gate", "gelu behind a prefix"])
    def test_every_width(self, target: Target, name: str, channels: int) -> None:
        assert_parity(make(name, target, shape=(2, 9, channels)), target, "fast")

    @on_every_target
    @pytest.mark.parametrize("heads", [(1, 2), (24, 128), (40, 128), (5, 64), (3, 96)], ids=str)
    @pytest.mark.parametrize("norm", ["head_twice", "token"])
    def test_every_head(self, target: Target, norm: str, heads: tuple[int, int]) -> None:
        op = rope(Draw((BF16, BF16), 0), (2, 9, 1), norm=norm, heads=heads)
        assert_parity(op.on(target), target, "fast")

    @on_every_target
    @pytest.mark.parametrize("name", ["norm in segments", "gated norm in segments", "gate in segments"])
    @pytest.mark.parametrize("split", [0, 1, SHAPE[1]])
    def test_every_split(self, target: Target, name: str, split: int) -> None:
        assert_parity(OPS[name](Draw((BF16, BF16), 0), SHAPE, split=split).on(target), target, "fast")

    @on_every_target
    @pytest.mark.parametrize("layout", ["every other", "transposed", "odd offset"])
    @pytest.mark.parametrize("name", FEW)
    def test_every_layout(self, target: Target, name: str, layout: str) -> None:
        def spread(t: Tensor) -> Tensor:
            if layout == "transposed":
                return t.transpose(0, -1).contiguous().transpose(0, -1)
            if layout == "odd offset":
                room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
                return room[1:].view(t.shape).copy_(t)
            wide = torch.zeros([2 * n for n in t.shape], dtype=t.dtype, device=t.device)
            return wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)

        op = make(name, target)
        assert_parity(replace(op, tensors=tuple(map(spread, op.tensors))), target, "fast")


class TestBits:
    @on_every_target
    @with_both_modes
    @pytest.mark.parametrize("name", OPS)
    def test_micro_batches(self, target: Target, name: str, mode: str) -> None:
        """Each sample alone gives its own outputs and gradients; those of weights are sums over samples."""
        op = make(name, target)
        grads = gradients_for(forward(op, mode, target.backend)[1])
        whole = results(op, mode, target.backend, grads)
        for sample in range(SHAPE[0]):
            part = slice(sample, sample + 1)
            tensors = (*(t[part] for t in op.tensors[: op.batched]), *op.tensors[op.batched :])
            alone = results(replace(op, tensors=tensors), mode, target.backend, [g[part] for g in grads])
            own = [n for n in whole if n.startswith("output") or int(n.split()[1]) < op.batched]
            assert_equal({n: alone[n] for n in own}, {n: whole[n][part] for n in own})

    @on_every_target
    @pytest.mark.parametrize("name", OPS)
    def test_every_run(self, target: Target, name: str) -> None:
        op = make(name, target)
        if target.device == "cuda" and "per token" not in name:
            op = make(name, target, shape=(2, 4100, 1536))
        first = results(op, "fast", target.backend)
        for _ in range(3):
            assert_equal(results(op, "fast", target.backend), first)

    @on_every_target
    @pytest.mark.parametrize("name", FEW)
    def test_a_side_stream(self, target: Target, name: str) -> None:
        op = make(name, target)
        wanted = results(op, "fast", target.backend)
        with stream_of(target):
            assert_equal(results(op, "fast", target.backend), wanted)

    @on_every_target
    @pytest.mark.parametrize("name", FEW)
    def test_replays_of_a_graph_follow_their_inputs(self, target: Target, name: str) -> None:
        static, *others = (make(name, target, seed=seed) for seed in range(3))
        grads = gradients_for(forward(static, "fast", target.backend)[1])
        wanted = [results(other, "fast", target.backend, grads) for other in others]
        outputs, replay = captured(target, lambda: results(static, "fast", target.backend, grads))
        for other, want in zip([*others, *others], [*wanted, *wanted], strict=True):
            for mine, value in zip(static.tensors, other.tensors, strict=True):
                mine.copy_(value)
            replay()
            target.synchronize()
            assert_equal(outputs, want)


class TestLaunches:
    def runs(self, target: Target, name: str) -> tuple[Callable[[], object], Callable[[], object]]:
        """A forward, and a backward on a graph that is kept."""
        op = make(name, target)
        leaves, outputs = forward(op, "fast", target.backend)
        grads = gradients_for(outputs)
        call = partial(op.function, "fast", target.backend, *leaves)
        if name.startswith("rope"):
            # The tables are the model's, not made by the call.
            table = angles(SHAPE[1] - 1, DIM // 2 if "tokens" in name else DIM, leaves[0].device)
            own = leaves[op.batched :]
            first = Stream(leaves[0], leaves[1], own[0], own[1], *table)
            second = Stream(*leaves[2:4], *own[2:4]) if op.batched == 4 else None
            norm = {"rope of two streams": "head_twice", "rope over tokens": "token"}.get(name, "head")
            call = partial(qk_norm_rope, first, second, norm=norm, backend=target.backend)
        return call, lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    @on_every_target
    @pytest.mark.parametrize("name", LAUNCHES)
    def test_one_a_call_and_one_for_sums(self, target: Target, name: str) -> None:
        for run, count in zip(self.runs(target, name), LAUNCHES[name], strict=True):
            run()
            if target.device == "cpu":
                # Within the reference torch starts its own; beside it nothing may.
                found = [n for n in ops_that_launch(run) if n.startswith("dgf::")]
                assert len(found) == 1, found
                continue
            if not profiler_sees_kernels():
                pytest.skip("the profiler sees no kernels on this machine")
            kernels, memory = device_activity(run)
            assert len(kernels) == count and memory == [], kernels + memory

    @on_every_target
    @pytest.mark.parametrize("name", LAUNCHES)
    def test_nothing_waits_for_the_device(self, target: Target, name: str) -> None:
        assert_nothing_waits(target, self.runs(target, name))
