"""Operators: their names, groups, FLOPs, traffic, and the workspace that CUDA's attention takes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
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
        r"(::|_)(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|matmul|linear|gemm|gemv)(_|$)|convolution|::conv\d|projection|lora_",
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


def workspace(func: Any, args: Any, out: Any) -> int:
    """Bytes that one of CUDA's operators takes beside its outputs while it runs.

    `lora_update` takes an input and an update in the dtype of its matrices.
    A backward of attention takes float32 sums of the queries' gradients, and one row sum. A convolution takes copies of
    its input, output and weight with the channels last, as cuDNN's tensor core kernels want them, unless they are so.
    That is read off public measurements of decodes (docs/memory.md), not off a document.
    """
    name = kind(func).name
    if name in CONVOLUTIONS:
        return sum(_copies(func, args, out, 8))
    if name.startswith("dgf.lora_update"):
        return _lora_workspace(args, out)
    if not name.endswith("attention_backward") or not name.startswith("aten._scaled_dot_product_"):
        return 0
    query: Tensor = args[1]
    batch, heads, tokens, width = query.shape
    # FlashAttention-2 rounds tokens to 128 and channels to 32; the others are taken to do the same.
    rows, columns = -(-tokens // 128) * 128, -(-width // 32) * 32
    # Float32 gradients are summed in place.
    sums = columns if query.element_size() < 4 else 0
    return int(4 * batch * heads * rows * (sums + 1))


def no_workspace(func: Any, args: Any, out: Any) -> int:
    """Nothing: what an operator takes within itself is not counted."""
    return 0


def cpu_workspace(func: Any, args: Any, out: Any) -> int:
    """The same on a CPU, for convolutions: oneDNN's copies of input and output in blocks of channels.

    The output's own memory is taken when the input's copy is gone. Small and 1 x 1 convolutions, which torch computes
    otherwise there, are counted alike.
    """
    if kind(func).name.startswith("dgf.lora_update"):
        return _lora_workspace(args, out, copies=2)
    if kind(func).name not in CONVOLUTIONS:
        return 0
    given, made, weight = _copies(func, args, out, 16)
    later = stored_bytes(out) if isinstance(out, Tensor) else made
    return weight + max(given + made - later, made)


def _lora_workspace(args: Any, out: Any, copies: int = 0) -> int:
    """Of `lora_update` (base, x, A, B, scale) or its backward (grad, x, inner, A, B, scale, wanted).

    `copies`: of what is added and of the sum, where two dtypes are added: a CPU's.
    """
    forward = len(args) == 5
    like, lora_a = args[0], args[2 if forward else 3]
    rows, wide = like.numel() // like.shape[-1], lora_a.element_size()
    cast = like.dtype != lora_a.dtype
    x, y = rows * lora_a.shape[1] * wide * cast, rows * like.shape[-1] * wide
    if forward:
        # The input's copy is gone when the output is there.
        return int(max(y + copies * y * cast, x - stored_bytes(out[0])))
    # The gradient's copy, and that of the input's gradient or of the input.
    by_x, by_a, _ = args[6]
    return int(y * cast + x * (by_x or by_a))


CONVOLUTIONS = ("aten.convolution", "aten.convolution_backward")
# A tensor of more elements than 32 bits count.
LARGE = 2**31


def _copies(func: Any, args: Any, out: Any, block: int) -> tuple[int, int, int]:
    """Bytes of a convolution's input, output and weight with channels in multiples of `block`."""
    forward = kind(func).name == CONVOLUTIONS[0]
    # The gradients of the input and of the weight are computed one after the other, from the same two copies.
    given, made, weight = (args[0], out, args[1]) if forward else (args[1], args[0], args[2])
    groups = args[8] if forward else args[9]
    last = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
    # Of the weight: results of fake convolutions lie as a CPU would have them.
    lies_so = weight.ndim > 3 and not weight.is_contiguous() and weight.is_contiguous(memory_format=last)
    if lies_so or groups == given.shape[1] > 1:
        return 0, 0, 0
    copies = [t.numel() // t.shape[1] * -(-t.shape[1] // block) * block * t.element_size() for t in (given, made)]
    if len(made) > 1 and made.numel() >= LARGE:
        # Measured decodes of 8 and 16 pictures have no room for it.
        copies[1] = 0
    return copies[0], copies[1], weight.numel() * weight.element_size()
