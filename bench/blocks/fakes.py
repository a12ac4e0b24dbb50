"""Operators that CUDA would take, on fake CPU tensors: a CPU-only torch refuses autograd on fake CUDA ones."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

library = torch.library.Library("dgf_bench", "DEF")
library.define("rms_norm(Tensor x, Tensor? weight) -> (Tensor, Tensor)")
library.define("rms_norm_backward(Tensor grad, Tensor x, Tensor rstd, Tensor? weight) -> (Tensor, Tensor)")


def _rms_norm(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if weight is None else torch.empty_like(weight)


torch.library.register_fake("dgf_bench::rms_norm", _rms_norm, lib=library)
torch.library.register_fake("dgf_bench::rms_norm_backward", _rms_norm_backward, lib=library)


class _RMSNorm(torch.autograd.Function):
    """Reads, writes and keeps what `_fused_rms_norm` does on CUDA; on CPU torch takes it apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        out, rstd = torch.ops.dgf_bench.rms_norm(x, weight)
        ctx.save_for_backward(x, rstd, weight)
        return out  # type: ignore[no-any-return]  # torch.ops has no types

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        saved = ctx.saved_tensors
        found, found_weight = torch.ops.dgf_bench.rms_norm_backward(grad, *saved)
        return found, None if saved[-1] is None else found_weight


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value)[0]  # type: ignore[no-any-return]
    # As torch's own dispatch: a bool mask becomes an additive one, with its rows stored once.
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
    bias = bias.expand(*query.shape[:-1], key.shape[-2])
    keeps = query.requires_grad or key.requires_grad or value.requires_grad
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, keeps)[0]  # type: ignore[no-any-return]


class CudaOperators(TorchFunctionMode):
    """Inside, attention and (with `fused_norm`) RMSNorm are CUDA's operators."""

    def __init__(self, fused_norm: bool = True) -> None:
        super().__init__()
        self.fused_norm = fused_norm

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.rms_norm and self.fused_norm:
            x, _, *rest = args
            return _RMSNorm.apply(x, rest[0] if rest else kwargs.get("weight"))
        return func(*args, **kwargs)
