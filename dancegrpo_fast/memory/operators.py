"""Operators: their names, groups, FLOPs, traffic, and the workspace that CUDA's attention takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.flop_counter import flop_registry

GROUPS = ("attention", "matmul", "convolution", "norm", "activation", "copy", "elementwise")
MATMUL = ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "dot")
COPY = ("clone", "copy_", "_to_copy", "cat", "stack", "constant_pad_nd", "slice_backward", "select_backward", "repeat")
ACTIVATIONS = ("gelu", "silu", "softmax", "sigmoid", "tanh", "relu", "dropout", "native_dropout")
ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")
# Their first argument gives no more than a shape.
FILL = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
OVERWRITE = ("copy_", "zero_", "fill_")


@cache
def group(op: str) -> str:
    """One of `GROUPS` for an operator's name, "namespace.operator"."""
    kind = op.partition(".")[2]
    stem = kind.removesuffix("_backward")
    if "attention" in kind:
        return "attention"
    if stem in MATMUL or "projection" in stem:
        return "matmul"
    if "convolution" in kind:
        return "convolution"
    if "norm" in kind and "linalg" not in kind:
        return "norm"
    if any(name in stem for name in ACTIVATIONS):
        return "activation"
    return "copy" if kind in COPY else "elementwise"


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
        computes=group(full) in ("attention", "matmul", "convolution") and space == "aten",
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
