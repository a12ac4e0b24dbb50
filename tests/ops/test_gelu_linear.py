"""A projection of GELU's result on the CPU: bits, gradients, registration, memory, where the patches use it."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dancegrpo_fast.ops.gelu_linear import cost, gelu_linear
from dancegrpo_fast.patch import _layers
from dancegrpo_fast.patch._pieces import Blocks, FeedForward, Unprojected

from ..tolerances import assert_within_budget
from .block_cases import MODES, Recorder, held, opcheck
from .cases import BF16, F16, F32, F64

# Rows of whole vectors: in the rest of one, torch's GELU of a slice has other bits on a CPU.
B, S, N, P, C = 2, 5, 64, 32, 12
NAMES = ("x", "prefix", "weight", "bias", "h_bias")


def draw(dtype: torch.dtype, *frozen: str, absent: tuple[str, ...] = ()) -> dict[str, Tensor | None]:
    """What makes h, the prefix and the projection."""
    generator = torch.Generator().manual_seed(0)
    width = N + (0 if "prefix" in absent else P)
    shapes = ((B, S, N), (B, S, P), (C, width), (C,), (N,))
    found: dict[str, Tensor | None] = {}
    for name, shape in zip(NAMES, shapes, strict=True):
        value = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        found[name] = None if name in absent else value.requires_grad_(name not in frozen)
    return found


def eager(x: Tensor, prefix: Tensor | None, weight: Tensor, bias: Tensor | None, h_bias: Tensor | None) -> Tensor:
    h = F.gelu(x if h_bias is None else x + h_bias, approximate="tanh")
    return F.linear(h if prefix is None else torch.cat([prefix, h], dim=-1), weight, bias)


def ours(mode: str, backend: str = "auto") -> Callable[..., Tensor]:
    def call(x: Tensor, prefix: Tensor | None, weight: Tensor, bias: Tensor | None, h_bias: Tensor | None) -> Tensor:
        h = x if h_bias is None else x + h_bias.detach()
        return gelu_linear(h, weight, bias, prefix=prefix, h_bias=h_bias, mode=mode, backend=backend)

    return call


def run(call: Callable[..., Tensor], tensors: dict[str, Tensor | None]) -> list[Tensor]:
    """The result and the gradients that are asked for."""
    out = call(**tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(out.dtype)
    leaves = [t for t in tensors.values() if t is not None and t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "all": ((), ()),
    "no prefix": ((), ("prefix",)),
    "no biases": ((), ("bias", "h_bias")),
    "frozen weight": (("weight", "bias"), ()),
    "frozen h": (("x", "h_bias"), ()),
    "frozen h, no prefix": (("x", "h_bias", "prefix"), ()),
    "biases alone": (("x", "prefix", "weight"), ()),
    "frozen biases": (("bias", "h_bias"), ()),
    "prefix alone": (("x", "h_bias", "weight", "bias"), ()),
}


def drawn(name: str, dtype: torch.dtype) -> dict[str, Tensor | None]:
    frozen, absent = CASES[name]
    return draw(dtype, *frozen, absent=absent)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_lossless_has_the_bits_of_eager(name: str, dtype: torch.dtype) -> None:
    tensors = drawn(name, dtype)
    for actual, wanted in zip(run(ours("lossless"), tensors), run(eager, tensors), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fast_is_within_the_budget(name: str, dtype: torch.dtype) -> None:
    tensors = drawn(name, dtype)
    doubled = {
        k: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()
    }
    results = (run(ours("fast"), tensors), run(eager, doubled), run(eager, tensors))
    for actual, truth, plain in zip(*results, strict=True):
        assert_within_budget(actual, truth, plain)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    tensors = {name: t.detach()[..., :3].clone() for name, t in draw(F64).items() if t is not None}
    tensors["weight"] = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(ours(mode), [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize(
    ("name", "backward"),
    [
        *((name, ["gelu_tanh_gradients"]) for name in ("all", "frozen biases")),
        *((name, ["gelu_tanh_backward"]) for name in ("frozen weight", "biases alone")),
        *(("frozen h", ["gelu_tanh"]), ("prefix alone", [])),
    ],
)
def test_only_what_is_needed_is_computed(name: str, backward: list[str]) -> None:
    with Recorder("dgf") as recorder:
        run(ours("fast"), drawn(name, F32))
    assert recorder.names == ["gelu_tanh", *backward]
    if "gelu_tanh_gradients" in backward:
        assert recorder.calls[1][1][3] == ("h_bias" not in CASES[name][0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["all", "no prefix", "no biases"])
def test_opcheck(name: str, mode: str) -> None:
    with Recorder("dgf") as recorder:
        run(ours(mode), drawn(name, F32))
    opcheck(recorder)


@pytest.mark.parametrize("name", ["all", "no prefix", "frozen weight"])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    tensors = drawn(name, F32)
    compiled = torch.compile(ours("fast"), fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(run(compiled, tensors), run(ours("fast"), tensors), strict=True):
        assert_within_budget(actual, wanted.double(), wanted)


def test_keeps_what_the_cost_formula_says() -> None:
    size = F32.itemsize
    for absent, prefix in (((), P), (("prefix",), 0)):
        tensors = draw(F32, absent=absent)
        found = held(lambda t=tensors: ours("fast")(**t), [tensors["weight"]])
        assert found == cost(B * S, N, size, prefix=prefix).bytes_saved
    # Frozen, it does without the prefix; without any gradient by h, without h.
    tensors = draw(F32, "weight", "bias")
    assert held(lambda: ours("fast")(**tensors), [tensors["weight"]]) == B * S * N * size
    tensors = draw(F32, *CASES["prefix alone"][0])
    assert held(lambda: ours("fast")(**tensors), [tensors["weight"]]) == 0


def test_costs() -> None:
    """Passes over tensors of h's size: one kernel's, and those of torch's kernels one after another."""
    fast, lossless = (cost(1, N, 2, mode=mode, h_bias=False).bytes_backward / (2 * N) for mode in MODES[::-1])
    assert (fast, lossless) == (4, 5)
    fast, lossless = (cost(1000, N, 2, prefix=N, mode=mode).bytes_backward // (2000 * N) for mode in MODES[::-1])
    assert (fast, lossless) == (6, 8)
    for mode in MODES:
        with FlopCounterMode(display=False) as counter:
            ours(mode)(**draw(F32, absent=("prefix",))).sum().backward()
        counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        wanted = cost(B * S, N, 4, mode=mode)
        assert counted["dgf.gelu_tanh"] == wanted.flops_forward
        assert counted["dgf.gelu_tanh_gradients"] == wanted.flops_backward


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant: bool) -> None:
    tensors = draw(F32)

    def call(**given: Tensor | None) -> Tensor:
        return checkpoint(lambda *t: ours("lossless")(*t), *given.values(), use_reentrant=reentrant)

    leaves = [t for t in tensors.values() if t is not None]
    call(**tensors).square().sum().backward()
    found = [t.grad for t in leaves]
    wanted = torch.autograd.grad(eager(**tensors).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


H, W = torch.zeros(2, 3, 4), torch.zeros(5, 4)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: gelu_linear(H.int(), W), "h: got torch.int32"),
    (lambda: gelu_linear(H[:0], W), r"h: got shape \(0, 3, 4\)"),
    (lambda: gelu_linear(H, W[0]), r"weight: got shape \(4,\), want \[C, 4\]"),
    (lambda: gelu_linear(H, W, prefix=H), r"weight: got torch.float32 of \(5, 4\), want .* of \(5, 8\)"),
    (lambda: gelu_linear(H, W.double()), "weight: got torch.float64"),
    (lambda: gelu_linear(H, W, W[0]), r"bias: got torch.float32 of \(4,\), want torch.float32 of \(5,\)"),
    (lambda: gelu_linear(H, W, h_bias=W[:, 0]), r"h_bias: got torch.float32 of \(5,\)"),
    (lambda: gelu_linear(H, W.to("meta")), "weight: got a tensor on meta, want it on h's device, cpu"),
    (lambda: gelu_linear(H, W, prefix=H.double()), "prefix: got torch.float64"),
    (lambda: gelu_linear(H, W, mode="exact"), 'mode: got "exact"'),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        call()


def test_refuses_autocast() -> None:
    with torch.autocast("cpu", dtype=BF16), pytest.raises(ValueError, match="autocast"):
        gelu_linear(H, W)


class TestFeedForward:
    """The patches' helper: where it computes both layers itself, and where it calls them."""

    def settings(self, **changes: Any) -> Blocks:
        given = {"mode": "fast", "recompute": "gelu", "trim_text": False, "gates_from_weights": False}
        return Blocks(**given | {"backend": "auto"} | changes)

    def layers(self) -> tuple[nn.Linear, nn.Linear, nn.Dropout]:
        torch.manual_seed(0)
        return nn.Linear(C, N), nn.Linear(N, C), nn.Dropout(0.0)

    def called(self, layers: tuple[nn.Linear, nn.Linear, nn.Dropout], settings: Blocks) -> Counter[str]:
        """Which registered ops run, both ways."""
        x, gate = torch.randn(B, S, C, requires_grad=True), torch.randn(B, C, requires_grad=True)
        with Recorder("dgf") as recorder:
            mlp = FeedForward(settings, layers[:2], x, gate, dropout=layers[2])
            out = mlp.project(mlp.hidden(x))
            out = out.layer(out.inputs) if isinstance(out, Unprojected) else out.out
            if out.requires_grad:
                out.sum().backward()
        return Counter(recorder.names)

    @pytest.mark.parametrize("recompute", ["gelu", "all"])
    def test_plain_layers(self, recompute: str) -> None:
        assert self.called(self.layers(), self.settings(recompute=recompute))["gelu_tanh_gradients"] == 1

    def test_anything_else_is_called(self) -> None:
        def hook(*unused: Any) -> None: ...

        def other_class(a: Any, b: Any, d: Any) -> None:
            b.__class__ = type("Other", (nn.Linear,), {})

        def wrapped(a: Any, b: Any, d: Any) -> None:
            a.forward = a.forward

        def dropping(a: Any, b: Any, d: Any) -> None:
            d.p = 0.5

        for change in (
            lambda a, b, d: a.register_forward_hook(hook),
            lambda a, b, d: b.register_forward_pre_hook(hook),
            lambda a, b, d: b.register_full_backward_hook(hook),
            lambda a, b, d: a.register_full_backward_pre_hook(hook),
            lambda a, b, d: d.register_forward_hook(hook),
            other_class,
            wrapped,
            dropping,
        ):
            layers = self.layers()
            change(*layers)
            assert self.called(layers, self.settings())["gelu_tanh_gradients"] == 0
        for settings in ({"recompute": "none"}, {"gates_from_weights": True}):
            assert self.called(self.layers(), self.settings(**settings))["gelu_tanh_gradients"] == 0
        with torch.no_grad():
            assert self.called(self.layers(), self.settings()) == {"gelu_tanh": 1}
        with torch.autocast("cpu", dtype=BF16):
            assert self.called(self.layers(), self.settings())["gelu_tanh_gradients"] == 0
        with nn.modules.module.register_module_forward_hook(hook):
            assert self.called(self.layers(), self.settings())["gelu_tanh_gradients"] == 0
        layers = self.layers()
        layers[1].double()
        assert not _layers.is_plain_linear(layers[1], F32) and _layers.is_plain_linear(layers[0], F32)
