"""The ops of transformer blocks on the CPU: definition, gradients, registration, memory, bad input."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dancegrpo_fast.ops import gated_residual as gated_op
from dancegrpo_fast.ops import gelu_tanh as gelu_op
from dancegrpo_fast.ops import norm_modulate as norm_op
from dancegrpo_fast.ops import qk_norm_rope as rope_op
from dancegrpo_fast.ops._block import recomputed
from dancegrpo_fast.ops.gated_projection import gated_projection, gated_projection_norm_modulate
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate, norm_modulate_fanout
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope

from ..release import release_but
from ..tolerances import assert_same_formula, assert_within_budget
from .block_cases import (
    CALLS,
    MODES,
    PROJECTIONS,
    B,
    C,
    D,
    H,
    Recorder,
    S,
    call_gated,
    call_gated_norm,
    call_gelu,
    call_norm,
    call_of,
    call_rope,
    draw,
    held,
    opcheck,
    tables,
)
from .cases import BF16, F16, F32, F64


@pytest.mark.parametrize("name", PROJECTIONS)
def test_gate_gradient_from_the_weights_is_exact(name: str) -> None:
    call, tensors = PROJECTIONS[name][0](F64, "fast")
    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_refuse_autocast(name: str) -> None:
    call, tensors = PROJECTIONS[name][0](F32, "fast")
    with (
        torch.autocast("cpu", dtype=BF16),
        pytest.raises(ValueError, match="autocast: got a call under it, want it off"),
    ):
        call(*tensors)


@pytest.mark.parametrize("biased", [True, False])
def test_gated_projection_is_handed_the_sum_for_its_bias(biased: bool) -> None:
    x, inputs, weight, bias, gate, scale, shift = PROJECTIONS["gated projection"][0](F64, "fast")[1]
    given = bias if biased else None
    with Recorder("dgf") as recorder:
        h, out = gated_projection_norm_modulate(x, inputs, weight, given, gate, scale, shift)
        torch.autograd.grad((h + out).sum(), [x])
        # Without the norm's gradient there is no pass to sum in.
        found = torch.autograd.grad(gated_projection_norm_modulate(x, inputs, weight, given, gate)[0].sum(), [gate])[0]
    (flags,) = (arguments[-2] for op, arguments, _ in recorder.calls if op.name().endswith("norm_modulate_backward"))
    assert flags[2] == biased
    assert_same_formula(found, F.linear(inputs, weight, given).sum(1))


@pytest.mark.parametrize("name", ["gated", "gated norm in two parts", "rope of diffusers' norm"])
def test_a_frozen_bias_is_not_summed(name: str) -> None:
    call, tensors = call_of(name, F32, "fast")
    with Recorder("dgf") as recorder:
        for wanted in (True, False):
            tensors[-1].requires_grad_(wanted)
            sum(output.sum() for output in call(*tensors)).backward()
    counts = [sum(arguments[-2]) for op, arguments, _ in recorder.calls if op.name().endswith("_backward")]
    assert counts[0] == counts[1] + 1


# Of each op one, with most operands.
FEW = (
    "affine norm",
    "gated norm in two parts",
    "fanout",
    "gated",
    "gelu",
    "rope of diffusers' norm",
    "rope over tokens",
)


@pytest.mark.parametrize("mode", release_but(("fast",), MODES))
@pytest.mark.parametrize("name", release_but(FEW, CALLS))
def test_gradcheck(name: str, mode: str) -> None:
    call, tensors = call_of(name, F64, mode)
    assert torch.autograd.gradcheck(call, tensors)


class TestDefinitions:
    """Against the formulas written out in float64."""

    def test_norm_modulate(self) -> None:
        x, scale, shift = call_norm(F64)[1]
        centred = x - x.mean(-1, keepdim=True)
        n = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert_same_formula(norm_modulate(x, scale, shift), n * (1 + scale[:, None]) + shift[:, None])
        n = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        weight = draw(C)
        assert_same_formula(norm_modulate(x, norm="rms", weight=weight, eps=1e-5), n * weight)

    def test_gated_residual_in_two_parts(self) -> None:
        x, y, gate, scale, shift = call_gated_norm(F64, split=True)[1]
        rows = torch.tensor([0, 0, 1, 1, 1])
        h, out = gated_residual_norm_modulate(x, y, gate, scale, shift, split=2)
        assert_same_formula(h, x + gate[:, rows] * y)
        assert_same_formula(h, gated_residual(x, y, gate, split=2))
        assert_same_formula(out, norm_modulate(h, scale[:, rows], shift[:, rows]))

    @pytest.mark.parametrize("rope", ["interleaved", "half"])
    def test_rotation(self, rope: str) -> None:
        q = draw(1, S, 1, D)
        angles = torch.arange(S, dtype=F64)[:, None] * torch.tensor([1.0, 0.1], dtype=F64)
        turned = qk_norm_rope(Stream(q, cos=angles.cos(), sin=angles.sin()), norm="none", rope=rope)[0][0, :, 0]
        pairs = ((0, 1), (2, 3)) if rope == "interleaved" else ((0, 2), (1, 3))
        for i, (a, b) in enumerate(pairs):
            number = torch.complex(q[0, :, 0, a], q[0, :, 0, b]) * torch.exp(1j * angles[:, i])
            assert_same_formula(turned[:, a], number.real)
            assert_same_formula(turned[:, b], number.imag)

    def test_joint_order_and_norms(self) -> None:
        call, (q, k, q2, k2, a, b) = call_rope(F64)
        query, key = call(q, k, q2, k2, a, b)
        rms = q2 / (q2.square().mean(-1, keepdim=True) + 1e-6).sqrt() * a
        assert query.shape == (B, S + 3, H, D)
        assert_same_formula(query[:, S:], rms)
        assert_same_formula(key[:, 4:5], F.rms_norm(k, (D,), b, 1e-6)[:, 4:5])

    def test_gelu_behind_a_prefix(self) -> None:
        x, prefix = call_gelu(F64)[1]
        out = gelu_tanh(x, prefix=prefix)
        assert torch.equal(out[..., :D], prefix)
        u = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
        assert_same_formula(out[..., D:], 0.5 * x * (1 + u.tanh()))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", [*CALLS, *PROJECTIONS])
def test_fast_is_no_worse_than_eager_rounding(name: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of both modes against float64 on the same low-precision inputs."""
    results = {}
    for mode, kind in (("fast", dtype), ("lossless", dtype), ("fast", F64)):
        call, tensors = call_of(name, kind, mode)
        if kind == F64:
            tensors = [t.detach().to(dtype).double().requires_grad_() for t in tensors]
        outputs = call(*tensors)
        seeds = [draw(*o.shape, dtype=dtype, seed=9, grad=False).to(kind) for o in outputs]
        grads = torch.autograd.grad(outputs, tensors, seeds, allow_unused=True)
        results[mode, kind] = [t for t in (*outputs, *grads) if t is not None]
    for fast, plain, truth in zip(
        results["fast", dtype], results["lossless", dtype], results["fast", F64], strict=True
    ):
        assert_within_budget(fast.detach(), truth.detach(), plain.detach())


EVERY_CHECK = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("mode", release_but(("lossless",), MODES))
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, mode: str) -> None:
    """Schemas, fake tensors and ahead-of-time tracing of every registered call that the op makes, both ways."""
    call, tensors = call_of(name, F32, mode)
    with Recorder("dgf") as recorder:
        outputs = call(*tensors)
        torch.autograd.grad(sum(o.sum() for o in outputs), tensors, allow_unused=True)
    assert {called.endswith("_backward") for called in recorder.names} == {True, False}
    # The mode is a string to what is traced and registered; it may change the outputs, which fakes must know.
    opcheck(recorder, test_utils=EVERY_CHECK if mode == "fast" else ("test_schema", "test_faketensor"))


@pytest.mark.parametrize("mode", release_but(("fast",), MODES))
@pytest.mark.parametrize("name", release_but(FEW, CALLS))
def test_compiles_without_a_graph_break(name: str, mode: str) -> None:
    torch._dynamo.reset()
    call, tensors = call_of(name, F32, mode)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (call, compiled):
        outputs = function(*tensors)
        grads = torch.autograd.grad(sum((o * o).sum() for o in outputs), tensors, allow_unused=True)
        found = [t for t in (*outputs, *grads) if t is not None]
        if function is call:
            wanted = found
    for actual, expected in zip(found, wanted, strict=True):
        assert_within_budget(actual.detach(), expected.detach().double(), expected.detach())


@pytest.mark.parametrize("name", CALLS)
def test_samples_do_not_depend_on_each_other(name: str) -> None:
    """The second sample alone gives the same bits."""
    call, tensors = call_of(name, BF16, "fast")
    both = call(*tensors)
    alone = call(*(t[1:] if t.shape[0] == B and t.ndim > 1 else t for t in tensors))
    assert all(torch.equal(a[1:], b) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_any_strides(name: str) -> None:
    call, tensors = call_of(name, F32, "fast")
    plain = call(*tensors)
    truth = call_of(name, F64, "fast")[0](*(t.detach().double() for t in tensors))

    def spread(t: Tensor) -> Tensor:
        room = torch.zeros(*(2 * n for n in t.shape), dtype=t.dtype)
        return room[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)

    for layout in (spread, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        found = call(*(layout(t.detach()) for t in tensors))
        for a, b, c in zip(found, truth, plain, strict=True):
            assert a.is_contiguous() or name == "fanout"
            assert_within_budget(a, b, c.detach())


class TestSavedTensors:
    """What is kept for the backward, and what is computed again."""

    def test_as_the_cost_formulas_say(self) -> None:
        size = F32.itemsize
        gated_norm, tensors = call_gated_norm(F32)
        frozen = [t.detach() if i >= 2 else t for i, t in enumerate(tensors)]
        rope, heads = call_rope(F32)
        small = sum(t.untyped_storage().nbytes() for t in (*tables(), *heads[4:], *heads[4:]))
        # Beside what the formula counts, rows of the gate, the scale and the shift.
        row = B * C * size
        for call, given, cost, more in (
            (*call_norm(F32), norm_op.cost(B, S, C, size), 2 * row),
            (gated_norm, tensors, norm_op.cost(B, S, C, size, gated=True), 3 * row),
            (gated_norm, frozen, norm_op.cost(B, S, C, size, gated=True, modulation_grads=False), 3 * row),
            (*call_gated(F32), gated_op.cost(B, S, C, size), row),
            (*call_gelu(F32), gelu_op.cost(B * S, C, size, prefix=D), 0),
            (rope, heads, rope_op.cost(B, S + 3, H, D, size), small),
        ):
            assert held(partial(call, *given)) == cost.bytes_saved + more

    def test_without_a_norm_only_tables_are_kept(self) -> None:
        call, tensors = call_rope(F32, norm="none")
        shapes = 4 * F32.itemsize
        assert held(lambda: call(*tensors)) == sum(t.untyped_storage().nbytes() for t in tables()) + shapes
        assert rope_op.cost(B, S, H, D, 4, norm=False).bytes_saved == 0

    @pytest.mark.parametrize("inside_checkpoint", [False, True])
    def test_recomputation_gives_the_same_gradients_and_keeps_less(self, inside_checkpoint: bool) -> None:
        x, scale, shift = call_norm(F32)[1]
        weight = draw(C, 4 * C, dtype=F32)

        def layer(x: Tensor, again: bool) -> Tensor:
            out = norm_modulate(x, scale, shift)
            with recomputed(out) if again else nullcontext():
                h = F.linear(out, weight.t())
            a = gelu_tanh(h)
            with recomputed(a) if again else nullcontext():
                return F.linear(a, weight)

        def run(again: bool) -> list[Tensor]:
            out = checkpoint(layer, x, again, use_reentrant=False) if inside_checkpoint else layer(x, again)
            return list(torch.autograd.grad(out.square().sum(), [x, scale, shift, weight]))

        for a, b in zip(run(True), run(False), strict=True):
            assert torch.equal(a, b)
        if not inside_checkpoint:
            kept, again = held(lambda: layer(x, False)), held(lambda: layer(x, True))
            assert kept - again == B * S * (C + 4 * C) * 4
            # The op's own backward frees what was computed again.
            out = layer(x, True)
            torch.autograd.grad(out.sum(), [weight], retain_graph=True)
            found = (torch.autograd.grad(o.sum(), [x, weight]) for o in (out, layer(x, False)))
            for a, b in zip(*found, strict=True):
                assert torch.equal(a, b)

    def test_checkpoint_policies_see_the_ops(self) -> None:
        x, scale, shift = call_norm(F32)[1]
        seen: list[str] = []

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if op.namespace == "dgf":
                seen.append(op.name())
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        out = checkpoint(
            lambda x: gelu_tanh(norm_modulate(x, scale, shift)),
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        out.sum().backward()
        assert "dgf::norm_modulate" in seen and "dgf::gelu_tanh" in seen

    def test_sums_for_biases_cost_an_addition_an_element(self) -> None:
        plain, summed = (norm_op.cost(B, S, C, 4, gated=True, y_bias=biased) for biased in (False, True))
        assert summed.flops_backward - plain.flops_backward == B * S * C
        assert summed._replace(flops_backward=plain.flops_backward) == plain
        for name, wanted in (
            ("gated", gated_op.cost(B, S, C, 4, y_bias=True)),
            ("gated norm in two parts", summed),
            ("rope of diffusers' norm", rope_op.cost(B, S + 3, H, D, 4, biases=True)),
        ):
            call, tensors = call_of(name, F32, "fast")
            with FlopCounterMode(display=False) as counter:
                sum(output.sum() for output in call(*tensors)).backward()
            counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
            assert [n for op, n in counted.items() if op.endswith("_backward")] == [wanted.flops_backward], name

    def test_flop_counter_sees_the_ops(self) -> None:
        for name in CALLS:
            call, tensors = call_of(name, F32, "fast")
            with FlopCounterMode(display=False) as counter:
                sum(output.sum() for output in call(*tensors)).backward()
            counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
            assert any(str(op).endswith("_backward") for op in counted), name
            assert all(n > 0 for n in counted.values()) and all("dgf" in op for op in counted)


X, SQUARE = torch.zeros(2, 3, 4), torch.zeros(4, 4)
ROW = torch.zeros(2, 4)
HEADS = torch.zeros(2, 3, 1, 4)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: norm_modulate(X[0], ROW, ROW), r"x: got shape \(3, 4\), want \[B, S, C\]"),
    (lambda: norm_modulate(X.int()), "x: got torch.int32"),
    (lambda: norm_modulate(X[:, :0]), "at least one element"),
    (lambda: norm_modulate(X, ROW), "shift: got None, want both"),
    (lambda: norm_modulate(X, None, ROW), "scale: got None, want both"),
    (lambda: norm_modulate(X, ROW[:, :3], ROW), r"scale: got shape \(2, 3\), want \[2, 4\] or \[2, 3, 4\]"),
    (lambda: norm_modulate(X, ROW, ROW, split=1), r"scale: got shape \(2, 4\), want \[2, 2, 4\], as split is given"),
    (lambda: norm_modulate(X, split=4), "split: got 4, want an int from 0 to 3 or None"),
    (lambda: norm_modulate(X, split=True), "split: got True"),
    (lambda: norm_modulate(X, norm="batch"), 'norm: got "batch", want "layer" or "rms"'),
    (lambda: norm_modulate(X, eps=0.0), "eps: got 0.0, want a finite number above 0"),
    (lambda: norm_modulate(X, mode="exact"), 'mode: got "exact"'),
    (lambda: norm_modulate(X, backend="cuda"), 'got "cuda" for a block op, want "auto", "triton" or "reference"'),
    (lambda: norm_modulate(X, norm_dtype=torch.int8), "norm_dtype: got torch.int8"),
    (lambda: norm_modulate(X, weight=torch.zeros(3)), r"weight: got shape \(3,\), want \(4,\)"),
    (lambda: norm_modulate(X, ROW.to("meta"), ROW), "scale: got a tensor on meta, want it on x's device, cpu"),
    (lambda: norm_modulate_fanout(X, consumers=0), "consumers: got 0, want an int of at least 1"),
    (lambda: gated_residual_norm_modulate(X, X[:, :2], ROW), r"y: got shape \(2, 2, 4\), want that of x, \(2, 3, 4\)"),
    (lambda: gated_residual_norm_modulate(X, X, None), "^gate: got None"),  # type: ignore[arg-type]
    (lambda: gated_residual(X, X, ROW[:1]), r"gate: got shape \(1, 4\)"),
    (lambda: gated_residual(X, X, ROW, y_bias=ROW[0, :3]), r"y_bias: got torch.float32 of \(3,\), want .* of \(4,\)"),
    (lambda: gated_residual_norm_modulate(X, X, ROW, y_bias=ROW[0].double()), "y_bias: got torch.float64"),
    (lambda: qk_norm_rope(Stream(HEADS, q_bias=ROW[0, :3])), r"stream.q_bias: got torch.float32 of \(3,\)"),
    (lambda: qk_norm_rope(Stream(HEADS, k_bias=ROW[0])), "stream.k_bias: got a tensor, want None without a key"),
    (lambda: gated_projection(X, X, torch.zeros(4, 3), None, ROW), r"weight: got torch.float32 of \(4, 3\)"),
    (lambda: gated_projection(X, X, SQUARE, None, X), r"gate: got torch.float32 of \(2, 3, 4\)"),
    (lambda: gated_projection(X, X.to("meta"), SQUARE, None, ROW), "^inputs: got a tensor on meta"),
    (lambda: gated_projection_norm_modulate(X, X, SQUARE, None, ROW, norm_weight=ROW), "^norm_weight: got shape"),
    (lambda: gated_projection_norm_modulate(X, X, SQUARE, None, ROW, norm_bias=ROW), "^norm_bias: got shape"),
    (lambda: gelu_tanh(torch.zeros(())), r"x: got shape \(\), want \[\.\.\., N\]"),
    (lambda: gelu_tanh(X, prefix=X.double()), "prefix: got torch.float64 of shape"),
    (lambda: gelu_tanh(X, prefix=X[:, :2]), r"prefix: got torch.float32 of shape \(2, 2, 4\)"),
    (lambda: qk_norm_rope(Stream(X)), r"stream.query: got shape \(2, 3, 4\), want \[B, S, H, D\]"),
    (lambda: qk_norm_rope(Stream(HEADS, HEADS.double())), "stream.key: got torch.float64"),
    (lambda: qk_norm_rope(Stream(HEADS, HEADS), Stream(HEADS)), "second.key: got None"),
    (lambda: qk_norm_rope(Stream(HEADS), Stream(HEADS, HEADS)), "second.key: got a tensor"),
    (lambda: qk_norm_rope(Stream(HEADS, q_weight=torch.zeros(3))), r"stream.q_weight: got shape \(3,\), want \(4,\)"),
    (lambda: qk_norm_rope(Stream(HEADS, q_weight=torch.zeros(4)), norm="none"), "want None without a norm"),
    (lambda: qk_norm_rope(Stream(HEADS, cos=torch.zeros(3, 4))), "stream.sin: got None, want both"),
    (lambda: qk_norm_rope(Stream(HEADS, cos=torch.zeros(4, 4), sin=torch.zeros(4, 4))), "with R of 1 to 3"),
    (lambda: qk_norm_rope(Stream(HEADS, cos=torch.zeros(3, 4), sin=torch.zeros(3, 2))), "stream.sin: got shape"),
    (lambda: qk_norm_rope(Stream(HEADS[..., :3], cos=torch.zeros(3, 3), sin=torch.zeros(3, 3))), "want an even number"),
    (lambda: qk_norm_rope(Stream(HEADS), norm="layer"), 'norm: got "layer", want "none", "head", .* or "token"'),
    (lambda: qk_norm_rope(Stream(HEADS), rope="full"), 'rope: got "full"'),
    (lambda: qk_norm_rope(Stream(HEADS), rope_gradient="twice"), 'rope_gradient: got "twice"'),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        call()


def test_unknown_option_of_the_fanout() -> None:
    with pytest.raises(TypeError, match="unexpected nrom"):
        norm_modulate_fanout(X, consumers=1, nrom="rms")
