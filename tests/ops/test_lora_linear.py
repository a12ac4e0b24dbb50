"""A linear layer with a LoRA update on the CPU: bits of peft's layers, gradients, registration, memory, bad input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dancegrpo_fast.activations.checkpointing import Keep, keeps
from dancegrpo_fast.kernels.lora_linear import reference
from dancegrpo_fast.ops import lora_linear as implementation
from dancegrpo_fast.ops.lora_linear import cost, lora_linear

from ..tolerances import assert_within_budget
from .block_cases import MODES, Recorder, held, opcheck
from .cases import BF16, F16, F32, F64

B, S, K, N, R = 2, 5, 24, 20, 3
NAMES = ("x", "weight", "bias", "lora_a", "lora_b")
FROZEN = ("weight", "bias")
# Of the base and of A and B.
DTYPES = [(F64, F64), (F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (BF16, F16), (F32, BF16)]


@dataclass(frozen=True)
class Case:
    """Shapes, the scale, and what needs no gradient or is not there."""

    lead: tuple[int, ...] = (B, S)
    inputs: int = K
    rank: int = R
    scale: float = 0.3
    frozen: tuple[str, ...] = FROZEN
    bias: bool = True
    layout: Callable[[Tensor], Tensor] = lambda x: x

    def draw(self, dtype: torch.dtype, lora: torch.dtype) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((*self.lead, self.inputs), (N, self.inputs), (N,), (self.rank, self.inputs), (N, self.rank))
        found: dict[str, Tensor | None] = {}
        for name, shape in zip(NAMES, shapes, strict=True):
            value = torch.randn(shape, generator=generator, dtype=F64) / (1 if name == "x" else shape[-1] ** 0.5)
            value = value.to(lora if name.startswith("lora") else dtype)
            found[name] = value.requires_grad_(name not in self.frozen) if self.bias or name != "bias" else None
        return found

    def eager(self, x: Tensor, *rest: Any) -> Tensor:
        return reference.lora_linear(self.layout(x), *rest, self.scale)

    def rounded(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """peft's layer with A and B in x's dtype, as autocast has them."""
        return self.eager(x, weight, bias, lora_a.to(x.dtype), lora_b.to(x.dtype))

    def ours(self, mode: str) -> Callable[..., Tensor]:
        return lambda x, *rest: lora_linear(self.layout(x), *rest, scale=self.scale, mode=mode)


CASES = {
    "usual": Case(),
    "scale 1, rank 1": Case(scale=1.0, rank=1),
    "scale 2, rank 64, no bias": Case(scale=2.0, rank=64, bias=False),
    "prime sizes": Case((3, 7), 13, 5),
    "two dimensions": Case((11,)),
    "four dimensions": Case((2, 3, 4)),
    "one row": Case((1, 1), rank=1),
    "no rows": Case((2, 0)),
    "everything trained": Case(frozen=()),
    "x needs no gradient": Case(frozen=(*FROZEN, "x")),
    "a frozen adapter": Case(frozen=(*FROZEN, "lora_a", "lora_b")),
    "B alone": Case(frozen=(*FROZEN, "x", "lora_a")),
    "A alone": Case(frozen=(*FROZEN, "lora_b")),
    "base alone": Case(frozen=("x", "lora_a", "lora_b")),
    "gapped": Case(layout=lambda x: x[:, 1:]),
    "gapped, a frozen adapter": Case(frozen=(*FROZEN, "lora_a", "lora_b"), layout=lambda x: x[:, 1:]),
    "transposed": Case(layout=lambda x: x.transpose(0, 1)),
    "expanded": Case(layout=lambda x: x[:1].expand(3, -1, -1)),
    "every other channel": Case(inputs=2 * K, layout=lambda x: torch.cat([x, x], -1)[..., ::2]),
}


def run(call: Callable[..., Tensor], tensors: dict[str, Tensor | None]) -> list[Tensor]:
    """The result and the gradients that are asked for, where x has two consumers."""
    leaves = [t for t in tensors.values() if t is not None and t.requires_grad]
    x, *rest = tensors.values()
    assert x is not None
    shared = x * 1
    outputs = call(shared, *rest), call(shared, *rest)
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(outputs[0].dtype)
    if not leaves:
        return [outputs[0].detach()]
    return [outputs[0].detach(), *torch.autograd.grad(outputs, leaves, (grad, grad * 0.7))]


@pytest.mark.parametrize("name", CASES)
def test_lossless_has_the_bits_of_peft(name: str) -> None:
    case = CASES[name]
    for dtypes in DTYPES:
        tensors = case.draw(*dtypes)
        for actual, wanted in zip(run(case.ours("lossless"), tensors), run(case.eager, tensors), strict=True):
            assert torch.equal(actual, wanted), dtypes


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_the_reference_is_peft(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    peft = pytest.importorskip("peft")
    case = CASES["usual"]
    tensors = case.draw(*dtypes)
    model = nn.Sequential(nn.Linear(K, N, dtype=dtypes[0]))
    config = peft.LoraConfig(r=R, lora_alpha=1, target_modules=["0"], init_lora_weights=False)
    layer = peft.inject_adapter_in_model(config, model)[0]
    with torch.no_grad():
        layer.scaling["default"] = case.scale
        parts = layer.base_layer.weight, layer.base_layer.bias, layer.lora_A.default.weight, layer.lora_B.default.weight
        for part, value in zip(parts, list(tensors.values())[1:], strict=True):
            part.data = value.detach()
    x = tensors["x"]
    # What peft adds to a layer's output in one dtype, and what rounds to another.
    assert x is not None and torch.equal(layer(x), case.eager(*tensors.values()))


@pytest.mark.parametrize("name", CASES)
def test_fast_is_within_the_budget(name: str) -> None:
    case = CASES[name]
    for dtypes in DTYPES[1:]:
        tensors = case.draw(*dtypes)
        doubled = {
            k: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()
        }
        results = (run(case.ours("fast"), tensors), run(case.eager, doubled), run(case.rounded, tensors))
        for actual, truth, plain in zip(*results, strict=True):
            assert_within_budget(actual, truth, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(mode: str, bias: bool) -> None:
    case = Case((2, 2), 3, 2, frozen=(), bias=bias)
    tensors = case.draw(F64, F64)
    given = [t for t in tensors.values() if t is not None]

    def call(*values: Tensor) -> Tensor:
        left = iter(values)
        return case.ours(mode)(*(None if t is None else next(left) for t in tensors.values()))

    assert torch.autograd.gradcheck(call, given)


def test_formula() -> None:
    x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([10.0, 20.0])
    lora_a, lora_b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [2.0]])
    for mode in MODES:
        out = lora_linear(x, weight, bias, lora_a, lora_b, scale=0.5, mode=mode)
        assert out.tolist() == [[12.5, 25.0]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["everything trained", "B alone"])
def test_opcheck(name: str, mode: str) -> None:
    case = CASES[name]
    with Recorder("dgf") as recorder:
        case.ours(mode)(*case.draw(BF16, F32).values()).sum().backward()
    assert len(recorder.calls) == 2
    opcheck(recorder)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_graph_break(mode: str) -> None:
    torch._dynamo.reset()
    case = CASES["usual"]
    tensors, doubled = case.draw(F32, F32), case.draw(F64, F64)
    for name, t in tensors.items():
        doubled[name] = None if t is None else t.detach().double().requires_grad_(t.requires_grad)
    compiled = torch.compile(case.ours(mode), fullgraph=True, backend="aot_eager")
    results = (run(compiled, tensors), run(case.eager, doubled), run(case.eager, tensors))
    for actual, truth, plain in zip(*results, strict=True):
        assert_within_budget(actual, truth, plain)


@pytest.mark.parametrize("mode", MODES)
def test_keeps_what_the_cost_formula_says(mode: str) -> None:
    case = Case((4, 16))
    for lora in (F32, BF16):
        tensors = case.draw(BF16, lora)
        weights = list(tensors.values())[1:]
        wanted = cost(64, K, N, R, 2, lora_itemsize=lora.itemsize, mode=mode).bytes_saved
        assert held(lambda t=tensors: case.ours(mode)(*t.values()), weights) == wanted
        plain = held(lambda t=tensors: case.eager(*t.values()), weights)
        assert plain - wanted == (64 * K * (4 - 2) if lora == F32 and mode == "lossless" else plain - wanted)
        assert plain >= wanted
    # Layers that read one x keep it once, where peft keeps a copy for each.
    tensors = case.draw(BF16, F32)
    x, *weights = tensors.values()
    inner = 64 * R * (2 if mode == "fast" else 4)
    assert held(lambda: [case.ours(mode)(x, *weights) for _ in range(3)], weights) == 64 * K * 2 + 3 * inner
    assert held(lambda: [case.eager(x, *weights) for _ in range(3)], weights) == 3 * 64 * (K * 4 + R * 4)
    # Without a gradient of A nothing of x's size.
    tensors = CASES["a frozen adapter"].draw(BF16, F32)
    assert held(lambda: case.ours(mode)(*tensors.values()), list(tensors.values())[1:]) == 0


@pytest.mark.parametrize("mode", MODES)
def test_flops_are_those_of_the_products(mode: str) -> None:
    """As torch's counter finds them in the reference."""
    for name in ("usual", "everything trained", "a frozen adapter", "B alone", "A alone", "base alone"):
        case = CASES[name]
        tensors = case.draw(F64, F64)
        counted = []
        for call in (case.ours(mode), case.eager):
            with FlopCounterMode(display=False) as counter:
                call(*tensors.values()).sum().backward()
            counted.append(counter.get_total_flops())
        # The sum that is the bias's gradient counts, too, where an op makes it.
        summed = B * S * N if "bias" not in case.frozen and mode == "fast" else 0
        assert counted[0] == counted[1] + summed, name


class Moved(TorchDispatchMode):
    """Numbers of bytes in tensors of a width that operators read and write; what writes in place reads, too."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths, self.bytes = widths, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("view", "t", "_unsafe_view", "new_empty", "empty_like"):
            return out
        # The result is an argument where it is given.
        seen = [t for t in (*args, out) if isinstance(t, Tensor) and ROWS in t.shape]
        self.bytes += sum(t.nbytes for t in seen if set(self.widths) & set(t.shape))
        return out


ROWS = 1000


@pytest.mark.parametrize(("dtypes", "scale"), [((BF16, F32), 0.3), ((BF16, F32), 1.0), ((BF16, BF16), 0.3)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_costs(mode: str, dtypes: tuple[torch.dtype, torch.dtype], scale: float) -> None:
    """The bytes that the implementation's own operators move, beside the base's two products."""
    wanted = cost(ROWS, K, N, R, 2, lora_itemsize=dtypes[1].itemsize, scaled=scale != 1, mode=mode)
    with torch.no_grad():
        x, weight, _, a, b = Case((ROWS,)).draw(*dtypes).values()
        assert x is not None and weight is not None and a is not None and b is not None
        grad = x @ weight.T
        if mode == "fast":
            with Moved(K, N) as forward:
                inner = implementation._forward_impl(x, weight, None, a, b, scale)[1]
            kept = x, inner, weight, a, b, scale, [True, False, False, True, True]
            with Moved(K, N) as backward:
                implementation._backward_impl(grad, *kept)
            # Products of the base, and of a CPU, which takes float32 for those that are summed in it.
            base = ROWS * (K + N) * 2
            copies = ROWS * (K + N) * (2 + 4 + 4 - 2)
            assert forward.bytes - base == wanted.bytes_forward
            assert backward.bytes - base - copies == wanted.bytes_backward
        else:
            with Moved(K, N) as forward:
                inner = implementation._update_impl(grad, x, a, b, scale)[1]
            with Moved(K, N) as backward:
                implementation._update_backward_impl(grad, x, inner, a, b, scale, [True, True, True])
            assert forward.bytes == wanted.bytes_forward
            assert backward.bytes == wanted.bytes_backward


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(mode: str, reentrant: bool) -> None:
    case = CASES["usual"]
    tensors = case.draw(BF16, F32)
    leaves = [t for t in tensors.values() if t is not None and t.requires_grad]
    checkpoint(case.ours(mode), *tensors.values(), use_reentrant=reentrant).square().sum().backward()
    found = [t.grad for t in leaves]
    wanted = torch.autograd.grad(case.ours(mode)(*tensors.values()).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_policy_that_keeps_matrix_products_keeps_these(mode: str) -> None:
    case = CASES["usual"]
    tensors = case.draw(BF16, F32)
    kept: list[str] = []
    groups = Keep({"matmul"}).groups

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if keeps(groups, op, args, kwargs):
            kept.append(op.name())
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(
        case.ours(mode),
        *tensors.values(),
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    with Recorder() as recorder:
        out.square().sum().backward()
    assert ("dgf::lora_linear" if mode == "fast" else "dgf::lora_update") in kept
    assert not {"lora_linear", "lora_update"} & set(recorder.names)


X, W, A, Z = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 4), torch.zeros(5, 2)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: lora_linear([1.0], W, None, A, Z, scale=1), r"^x: got list \(1.0\), want a torch.Tensor"),  # type: ignore[arg-type]
    (lambda: lora_linear(X.int(), W, None, A, Z, scale=1), "^x: got torch.int32"),
    (lambda: lora_linear(X[0, 0], W, None, A, Z, scale=1), r"^x: got shape \(4,\), want \[\.\.\., K\]"),
    (lambda: lora_linear(X[..., :3], W, None, A, Z, scale=1), r"^x: got torch.float32 of \(2, 3, 3\), want .*4\)"),
    (lambda: lora_linear(X.bfloat16(), W, None, A, Z, scale=1), "^x: got torch.bfloat16 .*, want torch.float32"),
    (lambda: lora_linear(X.to("meta"), W, None, A, Z, scale=1), "^x: got a tensor on meta, want it on weight's"),
    (lambda: lora_linear(X, W[0], None, A, Z, scale=1), r"^weight: got shape \(4,\), want \[N, K\]"),
    (lambda: lora_linear(X, W, A[0], A, Z, scale=1), r"^bias: got torch.float32 of \(4,\), want torch.float32 of \(5,"),
    (lambda: lora_linear(X, W, None, A[:, :3], Z, scale=1), r"^lora_a: got torch.float32 of \(2, 3\), want .*\(2, 4\)"),
    (lambda: lora_linear(X, W, None, [A, A], [Z, Z], scale=1), "^lora_a: got list .*, want a torch.Tensor"),  # type: ignore[arg-type]
    (lambda: lora_linear(X, W, None, A, Z.T, scale=1), r"^lora_b: got torch.float32 of \(2, 5\), want .*\(5, 2\)"),
    (lambda: lora_linear(X, W, None, A, Z.double(), scale=1), "^lora_b: got torch.float64 .*, want torch.float32"),
    (lambda: lora_linear(X, W, None, A, Z, scale=float("nan")), "^scale: got nan, want a finite number"),
    (lambda: lora_linear(X, W, None, A, Z, scale=torch.ones(())), "^scale: got"),  # type: ignore[arg-type]
    (lambda: lora_linear(X, W, None, A, Z, scale=1, mode="exact"), '^mode: got "exact"'),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    call, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        call()


def test_refuses_autocast() -> None:
    with torch.autocast("cpu", dtype=BF16), pytest.raises(ValueError, match=r"^autocast: got a call under it"):
        lora_linear(X, W, None, A, Z, scale=1)
