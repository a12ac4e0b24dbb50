"""Frozen weights of LoRA in fewer bits: what is stored, and what using them takes.

nf4 and int8 are bitsandbytes', as diffusers loads them: every linear layer of the model, in blocks or not, but for
those that diffusers keeps in float32; biases stay bfloat16. Bytes of a layer with n weights in r rows, as bitsandbytes
0.48 and 0.50 store them (tests/memory/test_quantised.py, where it is installed):
    nf4     n / 2, a float32 scale for 64 weights, and a table of 16 float32 values (no double quantisation)
    int8    n, and a float32 scale a row
What their conversions take is in the trace, whose layers are `converted`'s.

fp8 is the trainer's, diffusers' layerwise casting after LoRA was added: weights and biases of linear and convolution
layers, one byte each, but for norms and embeddings. A layer is cast to bfloat16 while it runs, and autograd keeps that
copy of a linear layer's weight until its backward: without checkpointing all copies stay, which is more than bfloat16
takes. (The few layers whose input needs no gradient or whose result is not used are counted like the others.)
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from ...activations import checkpointing
from ...activations.streaming import packed
from .cases import Case, block_counts, build, resolved, whole_model
from .converted import layers

INT8 = (
    "int8: bitsandbytes keeps the input of every quantised layer until the backward, in checkpointed blocks too; nf4"
    " does not"
)


@dataclass(frozen=True)
class Quantised:
    """Bytes.

    Attributes:
        stored: of all parameters.
        largest: of fp8, the largest layer in bfloat16.
        casts: of fp8, of what autograd keeps of each block that is not checkpointed.
        converted, in_blocks: of fp8, what the layers take in bfloat16, of the whole model and of each block.
        streams: of each block's frozen weights, as block swap moves them.
    """

    stored: int
    largest: int
    casts: tuple[int, ...]
    converted: int
    in_blocks: tuple[int, ...]
    streams: tuple[int, ...]


def conversion_bytes(found: Quantised, policies: Sequence[Hashable]) -> tuple[float, float]:
    """Of fp8: what converting the weights reads and writes in a forward, and where blocks run again in its backward.

    Args:
        found: of the model.
        policies: as of `kept_casts`.
    """
    chosen = _chosen(policies, len(found.in_blocks))
    again = sum(size for size, policy in zip(found.in_blocks, chosen, strict=True) if policy not in (None, "none"))
    # One byte is read for two that are written.
    return 1.5 * found.converted, 1.5 * again


def quantised(case: Case, base: str) -> Quantised:
    """Of the whole model with its LoRA layers; `base` is "nf4", "int8" or "fp8"."""
    # Sizes of the call change no weight.
    plain = replace(case, frames=1, height=1, width=1, rows=1, sequence_parallel=1)
    plain = replace(plain, kernel="flash", train=True, quantization="none")
    return _quantised(plain, base)


@lru_cache(maxsize=8)
def _quantised(case: Case, base: str) -> Quantised:
    spec = resolved(case.spec)
    if base == "fp8":
        return _layerwise(case)
    model = whole_model(case)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    frozen = [layer.weight for layer in layers(model, spec.keep_in_float32).values()]
    parts = {id(w): nf4_parts(w.numel()) if base == "nf4" else (w.numel(), 4 * len(w)) for w in frozen}
    saved = sum(w.nbytes for w in frozen)
    # The last part, nf4's table or int8's scales, stays on the device.
    streams = _streams(model, {key: part[:-1] for key, part in parts.items()})
    return Quantised(whole - saved + sum(map(sum, parts.values())), 0, (), 0, (), streams)


def nf4_parts(n: int) -> tuple[int, int, int]:
    """Bytes of one layer's n weights: these, their scales, and the table."""
    return -(-n // 2), 4 * -(-n // 64), 4 * 16


def _streams(model: nn.Module, parts: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """Of each block; `parts` has bytes of parameters by `id`, where they are not as on the `meta` device."""
    frozen = [[p for p in block.parameters() if not p.requires_grad] for block in checkpointing.blocks_of(model)]
    return tuple(packed([size for p in block for size in parts.get(id(p), [p.nbytes])])[1] for block in frozen)


def _by_block(sizes: Mapping[str, int], paths: Sequence[str]) -> list[int]:
    return [sum(size for name, size in sizes.items() if name.startswith(path + ".")) for path in paths]


def _layerwise(case: Case) -> Quantised:
    """On the `meta` device diffusers' own hooks cast what they would cast."""
    from ...quantization import store_in_fp8

    model = build(case, block_counts(case))
    paths = checkpointing.block_paths(model)
    store_in_fp8(model, torch.bfloat16)
    stored_in = {
        name: (module, 2 * module.weight.numel())
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dtype == torch.float8_e4m3fn
    }
    linear = {name: size for name, (module, size) in stored_in.items() if isinstance(module, nn.Linear)}
    casts = tuple(_by_block(linear, paths))
    sizes = {name: size for name, (_, size) in stored_in.items()}
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(linear.values(), default=0)
    in_blocks = tuple(_by_block(sizes, paths))
    return Quantised(stored, largest, casts, sum(sizes.values()), in_blocks, _streams(model, {}))


def kept_casts(found: Quantised, policies: Sequence[Hashable]) -> tuple[int, int]:
    """Of fp8: what blocks that are not checkpointed keep after the forward, and the most that one computes again.

    Args:
        found: of the model.
        policies: one for every block, or one for the whole model.
    """
    if not found.casts:
        return 0, 0
    chosen = _chosen(policies, len(found.casts))
    kept = sum(size for size, policy in zip(found.casts, chosen, strict=True) if policy in (None, "none"))
    again = [size for size, policy in zip(found.casts, chosen, strict=True) if policy not in (None, "none")]
    return kept, max(again, default=0)


def _chosen(policies: Sequence[Hashable], count: int) -> list[Hashable]:
    if len(policies) == count:
        return list(policies)
    return list(checkpointing.resolve(policies[0], count))  # type: ignore[arg-type]  # a policy
