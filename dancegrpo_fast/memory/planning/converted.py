"""Linear layers that allocate what bitsandbytes' do, so that a trace of a quantised model is one of its conversions.

nf4 (`MatMul4Bit`): the weight is there in bfloat16 while its product is computed, in the forward and in the backward.
int8 (`MatMul8bitLt` without outliers, as the trainer loads it): a float16 copy of the input, its int8 codes, int32 sums
of the result, and these in float16 before bfloat16. Its context holds the input where autograd's hooks do not see it,
so that checkpointed blocks keep it too. The backward has the weight in bfloat16.

Read from bitsandbytes 0.48 (`autograd/_functions.py`, `backends/cuda/ops.py`) and peft 0.21 (`lora/bnb.py`).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

KINDS = ("nf4", "int8")

library = torch.library.Library("dgf_converted", "DEF")
library.define("dequantize(Tensor stored, int rows, int columns) -> Tensor")
library.define("int8_sums(Tensor codes, Tensor weight) -> Tensor")
# Groups of operators go by names: like bitsandbytes' operator of this name, its result is one of a matrix product.
library.define("int8_scaled_mm(Tensor sums, Tensor codes) -> Tensor")


def _dequantize(stored: Tensor, rows: int, columns: int) -> Tensor:
    return stored.new_empty((rows, columns), dtype=torch.bfloat16)


def _int8_sums(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=torch.int32)


def _int8_scaled_mm(sums: Tensor, codes: Tensor) -> Tensor:
    return torch.empty_like(sums, dtype=torch.bfloat16)


torch.library.register_fake("dgf_converted::dequantize", _dequantize, lib=library)
torch.library.register_fake("dgf_converted::int8_sums", _int8_sums, lib=library)
torch.library.register_fake("dgf_converted::int8_scaled_mm", _int8_scaled_mm, lib=library)


@register_flop_formula(torch.ops.dgf_converted.int8_scaled_mm)
def _flops(sums: tuple[int, int], codes: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * sums[0] * sums[1] * codes[1]


class _Nf4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, bias: Tensor | None, rows: int, columns: int) -> Tensor:
        ctx.weight = stored, rows, columns
        return F.linear(x, torch.ops.dgf_converted.dequantize(stored, rows, columns), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight = torch.ops.dgf_converted.dequantize(*ctx.weight)
        return torch.matmul(grad, weight.to(grad.dtype)), None, None, None, None


class _Int8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes = rows.to(torch.float16).to(torch.int8)
        sums = torch.ops.dgf_converted.int8_sums(codes, weight)
        found: Tensor = torch.ops.dgf_converted.int8_scaled_mm(sums.to(torch.float16), codes)
        # Not `save_for_backward`: a checkpoint does not drop it.
        ctx.rows, ctx.weight, ctx.shape = rows if ctx.needs_input_grad[0] else None, weight, x.shape
        return found.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        weight = torch.ops.dgf_converted.dequantize(ctx.weight, *ctx.weight.shape)
        return torch.matmul(rows.to(ctx.rows.dtype), weight.to(ctx.rows.dtype)).view(ctx.shape), None


class Converted(nn.Module):
    """Stands for a frozen linear layer that bitsandbytes stores as `kind`; only its storages mean anything.

    Args:
        layer: on the `meta` device.
        kind: "nf4" or "int8".
        adapted: it is below LoRA layers: peft copies what such a layer of nf4 returns.
    """

    def __init__(self, layer: nn.Linear, kind: str, adapted: bool) -> None:
        super().__init__()
        self.kind, self.adapted = kind, adapted
        self.out_features, self.in_features = layer.weight.shape
        self.bias = layer.bias
        n, device = layer.weight.numel(), layer.weight.device
        if kind == "nf4":
            self.register_buffer("weight", torch.empty(-(-n // 2), dtype=torch.uint8, device=device))
            self.register_buffer("scale", torch.empty(-(-n // 64), device=device))
        else:
            self.register_buffer("weight", torch.empty_like(layer.weight, dtype=torch.int8))
            self.register_buffer("scale", torch.empty(self.out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` of any float dtype to `[..., out]` of the same."""
        if self.kind == "int8":
            found: Tensor = _Int8.apply(x, self.weight)
            # bitsandbytes adds it in place within its operator.
            return found
        given = x.to(torch.bfloat16)
        found = _Nf4.apply(given, self.weight, self.bias, self.out_features, self.in_features).to(x.dtype)
        return found.clone() if self.adapted else found


def layers(model: nn.Module, keep_in_float32: Iterable[str]) -> dict[str, nn.Linear]:
    """By name, the frozen linear layers that diffusers has bitsandbytes convert."""
    kept = set(keep_in_float32)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and not kept & set(name.split("."))
    }


def convert(model: nn.Module, kind: str, keep_in_float32: Iterable[str]) -> None:
    """Puts `Converted` in the place of those layers.

    Args:
        model: on the `meta` device, with its LoRA layers.
        kind: "nf4" or "int8".
        keep_in_float32: parts of parameter names that diffusers leaves in float32.
    """
    for name, layer in layers(model, keep_in_float32).items():
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, Converted(layer, kind, own == "base_layer"))
