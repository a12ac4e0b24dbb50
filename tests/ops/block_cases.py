"""Calls of every block op on small tensors, which several tests look at."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dancegrpo_fast.ops.gated_projection import gated_projection, gated_projection_norm_modulate
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.gelu_tanh import gelu_tanh
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate, norm_modulate_fanout
from dancegrpo_fast.ops.qk_norm_rope import Stream, qk_norm_rope

from .cases import F32, F64

B, S, C, H, D = 2, 5, 6, 2, 4


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype).requires_grad_(grad)


def tables(rows: int = S, width: int = D, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows * width, dtype=F64).reshape(rows, width) / 7
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Recorder(TorchDispatchMode):
    """Remembers the calls that reach torch, or those of our own ops alone."""

    def __init__(self, namespace: str | None = None) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.namespace in (None, func.namespace):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [func.name().removeprefix("dgf::") for func, _, _ in self.calls]


def opcheck(recorder: Recorder, **options: Any) -> None:
    """Every call that was remembered, on tensors outside of the graph."""
    for func, args, kwargs in recorder.calls:
        plain = torch.utils._pytree.tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, args)
        torch.library.opcheck(func, plain, kwargs, **options)


def held(call: Callable[[], Any], but: Iterable[Tensor | None] = ()) -> int:
    """Bytes that autograd keeps of what is not in `but`."""
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = call()
    known = {t.untyped_storage()._cdata for t in but if t is not None}
    total = sum(storage.nbytes() for key, storage in storages.items() if key not in known)
    del outputs
    return total


def call_norm(dtype: torch.dtype, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    tensors = [draw(B, S, C, dtype=dtype), *(draw(B, C, dtype=dtype, seed=i) for i in (1, 2))]
    return lambda x, scale, shift: norm_modulate(x, scale, shift, **options), tensors


def call_affine(dtype: torch.dtype, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    tensors = [draw(B, S, C, dtype=dtype), draw(C, dtype=dtype), draw(C, dtype=dtype, seed=1)]
    return lambda x, weight, bias: norm_modulate(x, weight=weight, bias=bias, **options), tensors


def with_y_bias(op: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """The op with the last tensor as the bias of what made y."""

    def call(x: Tensor, y: Tensor, *rest: Tensor) -> Any:
        *parameters, bias = rest
        return op(x, y + bias.detach(), *parameters, y_bias=bias, **settings)

    return call


def call_gated_norm(
    dtype: torch.dtype, split: bool = False, biased: bool = False, **options: Any
) -> tuple[Callable[..., Any], list[Tensor]]:
    rows = (B, 2, C) if split else (B, C)
    tensors = [draw(B, S, C, dtype=dtype), draw(B, S, C, dtype=dtype, seed=1)]
    tensors += [draw(*rows, dtype=dtype, seed=i) for i in (2, 3, 4)]
    settings = options | ({"split": 2} if split else {})
    if biased:
        return with_y_bias(gated_residual_norm_modulate, settings), [*tensors, draw(C, dtype=dtype, seed=5)]
    return lambda *t: gated_residual_norm_modulate(*t, **settings), tensors


def call_fanout(dtype: torch.dtype, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    tensors = [draw(B, S, C, dtype=dtype), draw(B, S, C, dtype=dtype, seed=1), draw(B, S, C, dtype=dtype, seed=2)]

    def call(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        h, a, b = norm_modulate_fanout(x, scale, shift, consumers=2, **options)
        return h * 2, a.sin(), b.cos()

    return call, tensors


def call_gated(dtype: torch.dtype, biased: bool = False, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    tensors = [draw(B, S, C, dtype=dtype), draw(B, S, C, dtype=dtype, seed=1), draw(B, C, dtype=dtype, seed=2)]
    if biased:
        return with_y_bias(gated_residual, options), [*tensors, draw(C, dtype=dtype, seed=3)]
    return lambda x, y, gate: gated_residual(x, y, gate, **options), tensors


def call_gelu(dtype: torch.dtype, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    tensors = [draw(B, S, C, dtype=dtype), draw(B, S, D, dtype=dtype)]
    return lambda x, prefix: gelu_tanh(x, prefix=prefix, **options), tensors


def call_rope(dtype: torch.dtype, biased: bool = False, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """`biased`: the first stream's queries and the second's keys have a bias."""
    width = H * D if options.get("norm") == "token" else D
    tensors = [draw(B, S, H, D, dtype=dtype, seed=i) for i in (0, 1)]
    tensors += [draw(B, 3, H, D, dtype=dtype, seed=i) for i in (2, 3)]
    tensors += [draw(width, dtype=dtype, seed=i) for i in (4, 5)]
    tensors += [draw(H * D, dtype=dtype, seed=i) for i in (6, 7)] if biased else []
    cos, sin = tables(dtype=F64 if dtype == F64 else F32)

    def call(
        q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, a: Tensor, b: Tensor, *biases: Tensor
    ) -> tuple[Tensor, Tensor]:
        q_bias, k_bias = biases or (None, None)
        if q_bias is not None and k_bias is not None:
            q, k2 = q + q_bias.detach().unflatten(0, (H, D)), k2 + k_bias.detach().unflatten(0, (H, D))
        weights, others = ((None, None),) * 2 if options.get("norm") == "none" else ((a, b), (a * 1, b * 1))
        # The second stream is not turned, the first not in all of its tokens.
        first = Stream(q, k, *weights, cos[:4], sin[:4], q_bias)
        query, key = qk_norm_rope(first, Stream(q2, k2, *others, k_bias=k_bias), **options)
        assert key is not None
        return query, key

    return call, tensors


def call_one_rope(dtype: torch.dtype, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    cos, sin = tables(S, D // 2, F64 if dtype == F64 else F32)
    return lambda q: qk_norm_rope(Stream(q, cos=cos, sin=sin), **options)[0], [draw(B, S, H, D, dtype=dtype)]


def call_projection(dtype: torch.dtype, mode: str) -> tuple[Callable[..., Any], list[Tensor]]:
    tensors = [draw(B, S, C, dtype=dtype), draw(B, S, D, dtype=dtype), draw(C, D, dtype=dtype), draw(C, dtype=dtype)]
    tensors += [draw(B, C, dtype=dtype, seed=i) for i in (1, 2, 3)]
    if mode == "lossless":

        def eager(x: Tensor, o: Tensor, w: Tensor, b: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
            h = x + gate[:, None] * F.linear(o, w, b)
            return h, F.layer_norm(h, (C,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

        return eager, tensors
    return gated_projection_norm_modulate, tensors


def call_last_projection(dtype: torch.dtype, mode: str) -> tuple[Callable[..., Any], list[Tensor]]:
    tensors = call_projection(dtype, mode)[1][:5]
    if mode == "lossless":
        return lambda x, o, w, b, gate: x + gate[:, None] * F.linear(o, w, b), tensors
    return gated_projection, tensors


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "norm": (call_norm, {}),
    "rms norm": (call_norm, {"norm": "rms"}),
    "affine norm": (call_affine, {}),
    "gated norm": (call_gated_norm, {}),
    "gated norm in two parts": (call_gated_norm, {"split": True, "biased": True}),
    "fanout": (call_fanout, {}),
    "gated": (call_gated, {"biased": True}),
    "gelu": (call_gelu, {}),
    "rope": (call_rope, {}),
    "rope of diffusers' norm": (call_rope, {"norm": "head_twice", "rope_gradient": "once", "biased": True}),
    "rope over tokens": (call_rope, {"norm": "token", "rope": "half", "biased": True}),
    "rope without norm": (call_rope, {"norm": "none"}),
    "rope of queries": (call_one_rope, {}),
}
# The gate's gradient from the weight's; their "lossless" mode here is eager torch, to compare with.
PROJECTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gated projection": (call_projection, {}),
    "last projection": (call_last_projection, {}),
}
MODES = ("lossless", "fast")


def call_of(name: str, dtype: torch.dtype, mode: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    build, options = (CALLS | PROJECTIONS)[name]
    call, tensors = build(dtype, mode=mode, **options)

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        found = call(*given)
        return found if isinstance(found, tuple) else (found,)

    return outputs, tensors
