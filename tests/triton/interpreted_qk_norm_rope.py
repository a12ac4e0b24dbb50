"""Queries and keys by Triton against the definition, forward and backward.

Collected by test_interpreted.py only, with TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops import _triton_qk_norm_rope as launcher
from dancegrpo_fast.ops._qk_norm_rope import _backward_outputs, _forward_outputs
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope

from ..ops.cases import BF16, F16, F32, F64
from ..release import release_but
from ..tolerances import assert_within_budget
from .guards import assert_filled, assert_same_bits, guarded

NORMS = ("none", "head", "head_twice", "token")
# Layout of pairs, and whether tables have a number for each column.
ROPES = (("interleaved", True), ("interleaved", False), ("half", True), ("half", False), (None, False))
# Past 32-bit offsets; nothing but the rows in use is ever touched.
FAR = 2**31


@pytest.fixture(autouse=True)
def chunks_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As long samples have them; the last chunk is shorter."""
    monkeypatch.setattr(launcher, "CHUNKS", 2)
    yield


def as_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Case:
    """What one call is told, and the shape and dtypes of its tensors."""

    norm: str = "head"
    rope: str | None = "interleaved"
    full: bool = True
    mode: str = "lossless"
    rope_gradient: str = "each"
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype | None = None
    weighted: bool = True
    biased: bool = False
    batch: int = 2
    tokens: tuple[int, ...] = (5, 2)
    heads: int = 3
    dim: int = 20
    # Numbers whose squares add up without rounding, so that a sum has no order.
    exact: bool = False
    layout: Callable[[Tensor], Tensor] = as_is

    def stream(self, index: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(index)
        tokens, found = self.tokens[index], {}
        for name in ("query", "key"):
            x = torch.randn(self.batch, tokens, self.heads, self.dim, generator=g)
            if self.exact:
                x = (x * 4).round().clamp(-8, 8) / 4
            found[name] = x.to(self.dtype)
        if self.norm != "none" and self.weighted:
            width = self.dim * (self.heads if self.norm == "token" else 1)
            for name in ("q_weight", "k_weight"):
                weight = 1.0 + 0.2 * torch.randn(width, generator=g)
                found[name] = weight.to(self.weight_dtype or self.dtype)
        if self.biased:
            found |= {name: torch.zeros(self.heads * self.dim, dtype=self.dtype) for name in ("q_bias", "k_bias")}
        if self.rope is not None:
            # One token stays as it is, where there is more than one.
            angle = torch.randn(max(1, tokens - 1), self.dim if self.full else self.dim // 2, generator=g)
            found |= {"cos": angle.cos(), "sin": angle.sin()}
        return found

    def streams(self) -> list[dict[str, Tensor]]:
        return [self.stream(i) for i in range(len(self.tokens))]

    def grads(self) -> list[Tensor]:
        """As attention leaves them: heads before tokens."""
        g = torch.Generator().manual_seed(9)
        shape = self.batch, self.heads, sum(self.tokens), self.dim
        return [torch.randn(shape, generator=g).to(self.dtype).transpose(1, 2) for _ in "qk"]


LEAVES = ("query", "key", "q_weight", "k_weight", "q_bias", "k_bias")


def run(
    case: Case,
    backend: str,
    streams: list[dict[str, Tensor]] | None = None,
    grads: list[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Both outputs and every gradient, through the public op."""
    given, leaves = [], []
    for stream in streams or case.streams():
        values = {k: v if dtype is None else v.to(dtype) for k, v in stream.items()}
        wanted = [values[k].requires_grad_() for k in LEAVES if k in values]
        leaves += wanted
        for k in ("query", "key"):
            values[k] = case.layout(values[k])
        given.append(Stream(**values))
    settings: dict[str, Any] = {"norm": case.norm, "rope": case.rope or "interleaved", "mode": case.mode}
    outputs = qk_norm_rope(*given, rope_gradient=case.rope_gradient, backend=backend, **settings)
    grads = [g.to(o.dtype) for g, o in zip(grads or case.grads(), outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def assert_matches_reference(case: Case) -> None:
    found, plain, truth = run(case, "triton"), run(case, "reference"), run(case, "reference", dtype=F64)
    for index, (actual, like, right) in enumerate(zip(found, plain, truth, strict=True)):
        assert_within_budget(actual, right, like)
        if case.mode == "lossless" and (case.norm == "none" or (case.exact and index < 2)):
            assert torch.equal(actual, like)


@pytest.mark.pairs
@pytest.mark.parametrize("mode", ["lossless", "fast"])
@pytest.mark.parametrize("rotation", release_but(ROPES[::2], ROPES), ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_matches_reference(norm: str, rotation: tuple[str | None, bool], mode: str) -> None:
    rope, full = rotation
    assert_matches_reference(Case(norm, rope, full, mode, biased=full, tokens=(3,), batch=1))


@pytest.mark.parametrize(
    "dtypes",
    release_but(((BF16, F32),), [(BF16, F32), (F16, F16), (F32, F32), (F32, BF16), (BF16, F16)]),
    ids=str,
)
@pytest.mark.parametrize("norm", release_but(("token",), NORMS))
def test_dtypes(norm: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    assert_matches_reference(Case(norm, dtype=dtypes[0], weight_dtype=dtypes[1], rope_gradient="once"))


@pytest.mark.parametrize("weight_dtype", release_but((F32,), [BF16, F16, F32]), ids=str)
@pytest.mark.parametrize("norm", release_but(("head", "token"), NORMS))
def test_forward_rounds_where_eager_does(norm: str, weight_dtype: torch.dtype) -> None:
    """Where sums have no order, lossless outputs are the reference's to the bit."""
    for weighted in (True, False):
        for dtype in (BF16, F16):
            sizes = {"dim": 64, "tokens": (3,)}
            case = Case(norm, dtype=dtype, weight_dtype=weight_dtype, weighted=weighted, exact=True, **sizes)
            found, plain = (qk_norm_rope(*case_streams(case), norm=norm, mode="lossless", backend=b) for b in PAIR)
            for actual, like in zip(found, plain, strict=True):
                assert actual is not None and like is not None and torch.equal(actual, like)


PAIR = ("triton", "reference")


def case_streams(case: Case) -> list[Stream]:
    return [Stream(**stream) for stream in case.streams()]


@pytest.mark.parametrize("rope_gradient", release_but(("each",), ["each", "once"]))
@pytest.mark.parametrize("dtype", release_but((BF16,), [BF16, F16]), ids=str)
def test_gradient_of_the_rotation_rounds_where_eager_does(dtype: torch.dtype, rope_gradient: str) -> None:
    for rope in ("interleaved", "half"):
        assert_matches_reference(Case("none", rope, dtype=dtype, rope_gradient=rope_gradient))


@pytest.mark.parametrize("dtype", release_but((BF16,), [BF16, F16]), ids=str)
@pytest.mark.parametrize("rope_gradient", ["each", "once"])
def test_tables_in_half_precision(dtype: torch.dtype, rope_gradient: str) -> None:
    """Real products with them are rounded one by one."""
    torch.manual_seed(0)
    for table_dtype in (BF16, F16):
        cos, sin = torch.rand(3, 16).to(table_dtype), torch.rand(3, 16).to(table_dtype)
        query = torch.randn(1, 3, 2, 32).to(dtype)
        stream = Stream(query, cos=cos, sin=sin)
        found, plain = (
            qk_norm_rope(stream, norm="none", mode="lossless", rope_gradient=rope_gradient, backend=b)[0] for b in PAIR
        )
        assert torch.equal(found, plain)


# heads, dim, tokens, batch: around a tile, several tiles, one of everything.
SHAPES = ((1, 16, (1,), 1), (1, 72, (7,), 3), (3, 80, (1, 2), 1), (17, 64, (2,), 1), (9, 128, (2,), 1))
SHAPES += ((2, 256, (3,), 1),)


@pytest.mark.parametrize(
    ("norm", "rope"), [pytest.param("head", "interleaved", marks=pytest.mark.release), ("token", "half")]
)
@pytest.mark.parametrize("shape", release_but((SHAPES[1],), SHAPES), ids=str)
def test_shapes(shape: tuple, norm: str, rope: str) -> None:
    heads, dim, tokens, batch = shape
    shape = {"heads": heads, "dim": dim, "tokens": tokens, "batch": batch}
    assert_matches_reference(Case(norm, rope, mode="fast", biased=True, **shape))


@pytest.mark.parametrize("norm", release_but(("head_twice",), NORMS))
def test_odd_heads_without_rotation(norm: str) -> None:
    assert_matches_reference(Case(norm, None, dim=17))


def of_a_chunk(x: Tensor) -> Tensor:
    """The middle third of joint projections."""
    return torch.cat([x, x, x], dim=-2).flatten(2).chunk(3, -1)[1].unflatten(-1, x.shape[2:])


def expanded(x: Tensor) -> Tensor:
    """Every sample the first one."""
    return x[:1].expand_as(x)


def across(x: Tensor) -> Tensor:
    """No dimension steps by one."""
    return torch.stack([x, x], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]


@pytest.mark.parametrize("rope", release_but(("interleaved",), ["interleaved", "half"]))
@pytest.mark.parametrize("layout", release_but((of_a_chunk,), [of_a_chunk, expanded, across]))
def test_layouts(layout: Callable[[Tensor], Tensor], rope: str) -> None:
    """The bits are those of contiguous inputs."""
    case = Case("head", rope, layout=layout, dim=32, tokens=(3,))
    given = case.streams()
    plain = [{k: layout(v).contiguous() if k in ("query", "key") else v for k, v in s.items()} for s in given]
    found, wanted = run(case, "triton", given)[:2], run(replace(case, layout=as_is), "triton", plain)[:2]
    assert_same_bits(found, wanted)
    assert_matches_reference(case)


def test_tables_of_any_strides() -> None:
    case = Case(full=False)
    streams = case.streams()
    for stream in streams:
        for name in ("cos", "sin"):
            stream[name] = stream[name].repeat_interleave(2, dim=1)[..., 0::2]
    assert_same_bits(run(case, "triton", streams), run(case, "triton"))


@pytest.mark.parametrize("norm", release_but(("token",), NORMS))
def test_samples_do_not_know_their_batch(norm: str) -> None:
    case = Case(norm, batch=3, tokens=(3, 1), mode="fast")
    streams, grads = case.streams(), case.grads()
    whole = run(case, "triton", streams, grads)
    for i in range(3):
        alone = [{k: (v[i : i + 1] if v.ndim == 4 else v).detach() for k, v in s.items()} for s in streams]
        single = run(case, "triton", alone, [g[i : i + 1] for g in grads])
        for one, all_of_them in zip(single, whole, strict=True):
            if one.ndim == 4:
                assert_same_bits([one], [all_of_them[i : i + 1]])


@pytest.mark.parametrize(("rope", "full"), ROPES[::2])
@pytest.mark.parametrize("norm", release_but(("head", "token"), NORMS))
def test_writes_everything_and_nothing_else(norm: str, rope: str | None, full: bool) -> None:
    case = Case(norm, rope, full, "fast", tokens=(2, 3), batch=1)
    streams = case_streams(case)
    rooms = [guarded(t.shape, t.dtype) for t in _forward_outputs(streams, norm)]
    outputs = tuple(inside for inside, _ in rooms)
    launcher.forward(streams, norm, 1e-6, rope or "interleaved", "each", "fast", outputs)
    assert_filled(rooms)
    biased = norm != "token"
    wanted = [found for stream in streams for found in (*(t is not None for t in stream[:4]), biased, biased)]
    given = [None if t is None else guarded(t.shape, t.dtype) for t in _backward_outputs(streams, wanted)]
    grads, rstds = case.grads(), (outputs[2], outputs[3])
    rest = streams, norm, 1e-6, rope or "interleaved", "each", "fast", [None if g is None else g[0] for g in given]
    launcher.backward(grads[0], grads[1], rstds, *rest)
    assert_filled([g for g in given if g is not None])


@pytest.mark.parametrize("norm", ["none", "head", "token"])
def test_only_what_is_wanted(norm: str) -> None:
    """Any choice of gradients is that of all of them; an output that nothing came from has none."""
    case = Case(norm, mode="fast", tokens=(3,), batch=1)
    streams = case_streams(case)
    outputs = _forward_outputs(streams, norm)
    launcher.forward(streams, norm, 1e-6, "interleaved", "each", "fast", outputs)

    def gradients(grads: list[Tensor | None], keep: Callable[[int], bool]) -> list[Tensor | None]:
        there = [*streams[0][:4], *[None if norm == "token" else streams[0].query] * 2]
        wanted = [t is not None and keep(i) for i, t in enumerate(there)]
        found = _backward_outputs(streams, wanted)
        rest = streams, norm, 1e-6, "interleaved", "each", "fast", found
        launcher.backward(grads[0], grads[1], (outputs[2], outputs[3]), *rest)
        return found

    query, key = case.grads()
    every = gradients([query, key], lambda i: True)
    # The weights' sums have an order of their own where the biases' are left beside them.
    apart = gradients([query, key], range(4).__contains__)
    for kept in ((0,), (3,), (1, 2), (4,), (1, 5)):
        whole = every if max(kept) > 3 else apart
        for found, wanted in zip(gradients([query, key], kept.__contains__), whole, strict=True):
            assert found is None or (wanted is not None and torch.equal(found, wanted))
    for index, grads in enumerate(([query, None], [None, key])):
        for i, (found, wanted) in enumerate(zip(gradients(grads, lambda i: True), every, strict=True)):
            if found is not None and wanted is not None:
                assert torch.equal(found, wanted if i % 2 == index else torch.zeros_like(wanted))


def test_no_key() -> None:
    case = Case()
    for backend in PAIR:
        streams = [Stream(s.query, None, s.q_weight, None, s.cos, s.sin) for s in case_streams(case)]
        query, key = qk_norm_rope(*streams, mode="lossless", backend=backend)
        assert key is None and torch.equal(query, run(case, backend)[0])


def test_far_batches() -> None:
    """Samples more than 2^31 elements apart."""
    case = Case(tokens=(2,), heads=2, dim=16)
    stream, grads = case.streams()[0], case.grads()
    strides = (FAR, 2 * 16, 16, 1)
    room = torch.empty(FAR + 2 * 2 * 16, dtype=BF16)
    far = room.as_strided((2, 2, 2, 16), strides).copy_(stream["query"])
    found = run(case, "triton", [stream | {"query": far, "key": stream["key"].clone()}], grads)
    wanted = run(case, "triton", [{k: v.detach().clone() for k, v in stream.items()}], grads)
    assert_same_bits(found, wanted)
