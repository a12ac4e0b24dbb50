"""Operators: their names, groups, FLOPs, traffic, and the workspace that CUDA's attention takes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.flop_counter import flop_registry

GROUPS = ("attention", "matmul", "norm", "activation", "rope", "elementwise", "cast", "copy", "other")
# The first that matches; what serves several purposes counts by the costlier one. The rest is views and small sums.
_PATTERNS = (
    # Kernels of torch, flash-attn, xformers and SageAttention, and builds of them under other names.
    ("attention", r"attn|attention|mha_(fwd|bwd|varlen)|flash\w*::\w*(fwd|bwd|forward|backward)|^sage"),
    ("rope", r"rope|rotary"),
    ("norm", r"(layer|rms|group|batch|instance)_?norm|norm_modulate|aten::(rsqrt|var_mean)$"),
    (
        "matmul",
        r"(::|_)(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|matmul|linear|gemm|gemv)(_|$)|convolution|::conv\d|projection",
    ),
    ("activation", r"gelu|silu|swish|sigmoid|tanh|relu|softmax|softplus|mish|::(elu|glu)(_|$)"),
    ("cast", r"aten::_to_copy$"),
    ("copy", r"aten::(clone|copy_?|cat|stack|constant_pad_nd|slice_backward|select_backward|repeat)$"),
    (
        "elementwise",
        r"gated_residual|aten::_?(add|sub|rsub|mul|div|neg|pow|sqrt|square|exp|log|sin|cos|abs|clamp|clamp_min|clamp_max"
        r"|minimum|maximum|where|addcmul|addcdiv|lerp|reciprocal|masked_fill|native_dropout|bernoulli)(_|$)",
    ),
)
ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")
# Their first argument gives no more than a shape.
FILL = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
OVERWRITE = ("copy_", "zero_", "fill_")


@cache
def group(op: str) -> str:
    """One of `GROUPS` for an operator's name: "aten::addmm", "aten.addmm.default" or "addmm".

    A backward op is in the group of its forward. Attention is what runs as one kernel: the math fallback is matrix
    products and a softmax. Convolutions count as matrix products. A "cast" changes the dtype: inputs of float32 LoRA
    layers in a bfloat16 model, and what autocast makes.
    """
    parts = op.replace("::", ".").split(".")
    name = "::".join(parts[:2]) if len(parts) > 1 else f"aten::{op}"
    return next((found for found, pattern in _PATTERNS if re.search(pattern, name)), "other")


@dataclass(frozen=True)
class Kind:
    """What does not depend on an operator's arguments."""

    name: str
    group: str
    formula: Any
    # Matrix products, convolutions and attention; their traffic is not counted.
    computes: bool
    allocates: bool
    mutates: bool
    # How many of its tensor arguments are not read.
    unread: int


@cache
def kind(func: Any) -> Kind:
    """Of an overload."""
    space, name = func._schema.name.split("::")
    full = f"{space}.{name}"
    return Kind(
        name=full,
        group=group(full),
        formula=flop_registry.get(func._overloadpacket),
        computes=group(full) in ("attention", "matmul") and space == "aten",
        allocates=space == "prim" or name in ALLOCATE,
        mutates=func._schema.is_mutable,
        unread=1 if name in OVERWRITE or name in FILL else 0,
    )


class Cost(NamedTuple):
    """Of one call: floating-point operations, and bytes read once and written once."""

    flops: int
    bytes: int


def stored_bytes(tensor: Tensor) -> int:
    """What a tensor covers in memory: an expanded dimension is one element wide."""
    numbers = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or not n)
    return numbers * tensor.element_size()


def cost(
    func: Any, args: Any, kwargs: dict[str, Any], out: Any, given: Sequence[Tensor], made: Sequence[Tensor]
) -> Cost:
    """Of one call, from its arguments, its result and the tensors in both; views and allocations cost nothing."""
    known = kind(func)
    flops = 0 if known.formula is None else known.formula(*args, **kwargs, out_val=out)
    if known.computes or known.allocates:
        return Cost(flops, 0)
    if not known.mutates:
        storages = {t.untyped_storage()._cdata for t in given}
        if all(t.untyped_storage()._cdata in storages for t in made):
            return Cost(flops, 0)
    return Cost(flops, sum(map(stored_bytes, given[known.unread :])) + sum(map(stored_bytes, made)))


def workspace(func: Any, args: Any) -> int:
    """Bytes that CUDA's attention takes beside its outputs: float32 sums of the queries' gradients, and one row sum."""
    name = kind(func).name
    if not name.endswith("attention_backward") or not name.startswith("aten._scaled_dot_product_"):
        return 0
    query: Tensor = args[1]
    batch, heads, tokens, width = query.shape
    # FlashAttention-2 rounds tokens to 128 and channels to 32; the others are taken to do the same.
    rows, columns = -(-tokens // 128) * 128, -(-width // 32) * 32
    # Float32 gradients are summed in place.
    sums = columns if query.element_size() < 4 else 0
    return int(4 * batch * heads * rows * (sums + 1))
