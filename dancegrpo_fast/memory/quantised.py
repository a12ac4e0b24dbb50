"""Frozen weights of LoRA in fewer bits: what is stored, and what using them takes.

nf4 and int8 are bitsandbytes', as diffusers loads them: every linear layer of the model, in blocks or not, but for
those that diffusers keeps in float32; biases stay bfloat16. Bytes of a layer with n weights in r rows, as bitsandbytes
0.48 and 0.50 store them (tests/memory/test_quantised.py, where it is installed):
    nf4     n / 2, a float32 scale for 64 weights, and a table of 16 float32 values (no double quantisation)
    int8    n, and a float32 scale a row
In the forward and again in the backward one layer at a time is there in bfloat16. LLM.int8 also keeps each layer's
input for the backward, and makes float16 and int8 copies of it, which is not counted.

fp8 is the trainer's, diffusers' layerwise casting after LoRA was added: weights and biases of linear and convolution
layers, one byte each, but for norms and embeddings. A layer is cast to bfloat16 while it runs, and autograd keeps that
copy of a linear layer's weight until its backward: without checkpointing all copies stay, which is more than bfloat16
takes. (The few layers whose input needs no gradient or whose result is not used are counted like the others.)
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from . import checkpointing
from .phases import Case, block_paths, build, kinds_of, resolved


@dataclass(frozen=True)
class Quantised:
    """Bytes.

    Attributes:
        stored: of all parameters.
        largest: of the largest layer in bfloat16.
        casts: of what autograd keeps of each block that is not checkpointed.
    """

    stored: int
    largest: int
    casts: tuple[int, ...]


def quantised(case: Case, base: str) -> Quantised:
    """Of the whole model with its LoRA layers; `base` is "nf4", "int8" or "fp8"."""
    # Sizes of the call change no weight.
    return _quantised(replace(case, frames=1, height=1, width=1, rows=1, kernel="flash", train=True), base)


@lru_cache(maxsize=8)
def _quantised(case: Case, base: str) -> Quantised:
    spec = resolved(case.spec)
    model = build(case, tuple(kind.blocks for kind in kinds_of(spec)))
    if base == "fp8":
        return _layerwise(model, block_paths(case))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    layers = [
        (module.weight.shape[0], module.weight.numel(), module.weight.element_size())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and not set(name.split(".")) & set(spec.keep_in_float32)
    ]
    stored = sum(nf4_bytes(n) if base == "nf4" else n + 4 * rows for rows, n, _ in layers)
    saved = sum(n * size for _, n, size in layers)
    return Quantised(whole - saved + stored, 2 * max((n for _, n, _ in layers), default=0), ())


def nf4_bytes(n: int) -> int:
    """Of one layer's n weights."""
    return -(-n // 2) + 4 * -(-n // 64) + 4 * 16


def _layerwise(model: nn.Module, paths: Sequence[str]) -> Quantised:
    """On the `meta` device diffusers' own hooks cast what they would cast."""
    from ..models.quantization import store_in_fp8

    store_in_fp8(model, torch.bfloat16)
    casts = dict.fromkeys(paths, 0)
    largest = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.weight.dtype != torch.float8_e4m3fn:
            continue
        size = 2 * module.weight.numel()
        largest = max(largest, size)
        for path in paths:
            if name.startswith(path + "."):
                casts[path] += size
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    return Quantised(stored, largest, tuple(casts.values()))


def kept_casts(found: Quantised, policies: Sequence[Hashable]) -> tuple[int, int]:
    """Of fp8: what blocks that are not checkpointed keep after the forward, and the most that one computes again.

    Args:
        found: of the model.
        policies: one for every block, or one for the whole model.
    """
    if not found.casts:
        return 0, 0
    chosen = list(policies) if len(policies) == len(found.casts) else _each(policies[0], len(found.casts))
    kept = sum(size for size, policy in zip(found.casts, chosen, strict=True) if policy in (None, "none"))
    again = [size for size, policy in zip(found.casts, chosen, strict=True) if policy not in (None, "none")]
    return kept, max(again, default=0)


def _each(policy: Hashable, count: int) -> list[Hashable]:
    return list(checkpointing.resolve(policy, count))  # type: ignore[arg-type]  # a policy
