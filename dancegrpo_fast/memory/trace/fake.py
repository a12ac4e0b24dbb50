"""Models on fake tensors, with the operators that CUDA would run.

The tensors say that they are on the CPU: a torch without CUDA refuses autograd on CUDA ones without memory. Where
CUDA's operators keep or need other memory than the CPU's, a `TorchFunctionMode` calls CUDA's.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper, cache, lru_cache
from inspect import unwrap
from types import MethodType
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import register_flop_formula

from .tensors import Fake, Fakes

ATTENTION = ("flash", "efficient", "cudnn", "math", "cpu")
HALF = (torch.float16, torch.bfloat16)

library = torch.library.Library("dgf_memory", "DEF")
library.define("rms_norm(Tensor x, Tensor? weight) -> (Tensor, Tensor)")
library.define("mm_float32(Tensor a, Tensor b) -> Tensor")
library.define("rms_norm_backward(Tensor grad, Tensor x, Tensor rstd, Tensor? weight) -> (Tensor, Tensor)")


def _rms_norm(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _mm_float32(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@register_flop_formula(torch.ops.dgf_memory.mm_float32)
def _mm_flops(a: tuple[int, int], b: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


torch.library.register_fake("dgf_memory::mm_float32", _mm_float32, lib=library)
torch.library.register_fake("dgf_memory::rms_norm", _rms_norm, lib=library)
torch.library.register_fake("dgf_memory::rms_norm_backward", _rms_norm_backward, lib=library)


class _RMSNorm(torch.autograd.Function):
    """Keeps what `_fused_rms_norm` does on CUDA; on the CPU torch takes it apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        out, rstd = torch.ops.dgf_memory.rms_norm(x, weight)
        ctx.save_for_backward(x, rstd, weight)
        return out  # type: ignore[no-any-return]  # torch.ops has no types

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        saved = ctx.saved_tensors
        found, found_weight = torch.ops.dgf_memory.rms_norm_backward(grad, *saved)
        return found, None if saved[-1] is None else found_weight


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """As torch's own dispatch: a bool mask becomes an additive one, its rows padded to 8 and stored once."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    tokens = key.shape[-2]
    if tokens % 8:
        mask = F.pad(mask, (0, 8 - tokens % 8))[..., :tokens]
    return mask.expand(*query.shape[:-1], tokens)


def attend(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by one of CUDA's operators; flash leaves masks and float32 to efficient."""
    aten = torch.ops.aten
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) if t.is_floating_point() else t for t in (query, key, value))
    if backend == "math":
        outputs = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return outputs[0]  # type: ignore[no-any-return]  # torch.ops has no types
    if enable_gqa and query.shape[-3] != key.shape[-3] and backend != "flash":
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    keeps = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if backend == "flash" and attn_mask is None and query.dtype in HALF:
        width = query.shape[-1]
        scale = width**-0.5 if scale is None else scale
        if width % 8:
            query, key, value = (F.pad(t, (0, 8 - width % 8)) for t in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        found: Tensor = out[..., :width] if width % 8 else out
        return found
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    operator = (
        aten._scaled_dot_product_cudnn_attention
        if backend == "cudnn" and query.dtype in HALF
        else aten._scaled_dot_product_efficient_attention
    )
    attended: Tensor = operator(query, key, value, bias, keeps, dropout_p, is_causal, scale=scale)[0]
    return attended


# What CUDA's autocast computes in float32 and the CPU's does not, as far as denoisers and VAEs call it.
_METHODS = ("exp", "log", "pow", "__pow__", "reciprocal", "rsqrt", "softmax", "sum", "cumsum", "prod", "norm")
_FUNCTIONS = ("layer_norm", "rms_norm", "group_norm", "softmax", "softplus", "mse_loss", "interpolate")
FLOAT32 = {
    *(getattr(F, name) for name in _FUNCTIONS),
    *(getattr(torch, name) for name in _METHODS if hasattr(torch, name)),
    *(getattr(Tensor, name) for name in _METHODS),
}


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """On CUDA one operator that keeps a mask of a byte a number; the CPU multiplies by a mask of `x`'s dtype."""
    if not training or not p:
        return x
    out: Tensor = torch.ops.aten.native_dropout(x, p, True)[0]
    return x.copy_(out) if inplace else out


class CudaOperators(TorchFunctionMode):
    """Inside, attention, what autocast computes in float32 and (with `fused_norm`) RMSNorm are as on CUDA."""

    def __init__(self, attention: str = "flash", fused_norm: bool = True) -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f'attention: got "{attention}", want one of {", ".join(ATTENTION)}')
        self.attention = attention
        self.fused_norm = fused_norm

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.attention == "cpu":
            return func(*args, **kwargs)
        if func in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF else t, (args, kwargs))
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attend(self.attention, *args, **kwargs)
        if func is F.rms_norm and self.fused_norm:
            x, _, *rest = args
            return _RMSNorm.apply(x, rest[0] if rest else kwargs.get("weight"))
        return func(*args, **kwargs)


@contextlib.contextmanager
def _blocks(cuda: bool) -> Iterator[None]:
    """Inside, block ops take fake weights for real ones, and do what they do on CUDA or on a CPU."""
    from ...ops import gated_projection
    from ...patch import _layers, _pieces

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_layers, "PLAIN", (*_layers.PLAIN, Fake)))
        if cuda:
            stack.enter_context(mock.patch.object(_pieces, "_norm_dtype", _norm_dtype))
            stack.enter_context(mock.patch.object(gated_projection, "weight_gradient", weight_gradient))
        yield


def _norm_dtype(x: Tensor) -> torch.dtype | None:
    return torch.float32 if torch.is_autocast_enabled("cpu") else None


def weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """What CUDA makes of bfloat16 in one product with a float32 result; for fake tensors."""
    found: Tensor = torch.ops.dgf_memory.mm_float32(grad.t(), inputs)
    return found


def _fake(tensor: Tensor) -> Tensor:
    """A fake of the same layout; inside the mode."""
    found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(found, tensor.requires_grad)
    return found.requires_grad_(tensor.requires_grad)


def _is_part(tensor: Tensor) -> bool:
    """A parameter that shares its storage, as weights in a buffer do."""
    return isinstance(tensor, nn.Parameter) and tensor.untyped_storage().nbytes() > tensor.nbytes


def _part(tensor: Tensor, buffers: dict[int, Tensor]) -> nn.Parameter:
    """A fake of it in a fake of its storage, which `buffers` has by the storage; inside the mode."""
    storage = tensor.untyped_storage()
    flat = buffers.setdefault(storage._cdata, torch.empty(storage.nbytes(), dtype=torch.uint8))
    found = flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return nn.Parameter(found, tensor.requires_grad)


@cache
def _cached_methods(cls: type) -> list[tuple[str, Callable[..., Any]]]:
    """Methods behind an `lru_cache`, by name, without it."""
    found: list[tuple[str, Callable[..., Any]]] = []
    for name in dir(cls):
        method = getattr(cls, name, None)
        cells = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
        if any(isinstance(held, _lru_cache_wrapper) for held in (method, *cells)):
            found.append((name, unwrap(cast(Any, method))))
    return found


@contextlib.contextmanager
def fake_tensors(
    *models: nn.Module, attention: str = "flash", fused_norm: bool = True
) -> Iterator[Callable[[Any], Any]]:
    """Inside, the models' parameters, gradients, buffers and other tensors are fake ones, and so is all that is made.

    Args:
        models: on the `meta` device, or real; they get their own tensors back at the end.
        attention: "flash", "efficient", "cudnn" or "math", as on CUDA (with its autocast), or "cpu": whatever the CPU
            runs.
        fused_norm: on CUDA, RMSNorm is one operator.

    Yields:
        A function that makes fakes of all tensors in a pytree, such as inputs; storages that are shared stay shared.

    Raises:
        ValueError: an unknown `attention`.
    """
    operators = CudaOperators(attention, fused_norm)
    made: dict[int, tuple[Tensor, Tensor]] = {}
    buffers: dict[int, Tensor] = {}

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            found = _part(tensor, buffers) if _is_part(tensor) else _fake(tensor)
            if tensor.is_leaf and tensor.grad is not None:
                found.grad = _fake(tensor.grad)
            # The original is kept, so that its id stays its own.
            made[id(tensor)] = (tensor, found)
        return made[id(tensor)][1]

    places: list[tuple[Any, str, Tensor]] = []
    for model in models:
        for module in model.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                places += [(held, name, value) for name, value in held.items() if isinstance(value, Tensor)]
    # What a method caches for the real model must not be fake.
    methods = [
        (module, name, lru_cache(maxsize=None)(MethodType(method, module)))
        for model in models
        for module in model.modules()
        for name, method in _cached_methods(cast(Any, type(module)))
    ]
    try:
        for module, name, method in methods:
            vars(module)[name] = method
        with Fakes(attention != "cpu"):
            for held, name, value in places:
                held[name] = convert(value)
            with operators, _blocks(attention != "cpu"):
                yield lambda tree: tree_map_only(Tensor, convert, tree)
    finally:
        for held, name, value in places:
            held[name] = value
        for module, name, _ in methods:
            vars(module).pop(name, None)
