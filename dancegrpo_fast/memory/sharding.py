"""What rests on one GPU: weights, gradients and states, whole or under FSDP, quantised or not. Formulas, all exact but
where they say otherwise.

FSDP over N: every parameter, gradient and state is 1/N. On the device besides, as "unsharded block": in a forward, the
largest block twice (the one that runs and the next, which is prefetched) and the parameters outside the blocks; in a
backward also the gradients of the largest block until they are reduced. "shard_grad_op" gathers once and keeps all.

Quantised bases, bytes a weight: int8 1 + 4 / in_features (a float32 scale a row); fp8 the same; nf4 1/2 + 4/64 (a
float32 scale for 64 weights). Only frozen linear weights in blocks; one at a time is dequantised to bf16.

8-bit AdamW: two bytes a parameter and two float32 scales for 256 of them; tensors of fewer than 4096 numbers stay in
float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import nn

from .blocks import compose
from .phases import Case, Kind, Vector, added, build, kinds_of, resolved
from .settings import Settings


@dataclass(frozen=True)
class Weights:
    """Sizes of a model's parameters.

    Attributes:
        numbers, bytes: of all parameters.
        trainable, trainable_bytes: of those that are trained.
        sizes: numbers in each trained tensor.
        block: numbers in the largest block, and `block_trainable` the trained ones among them.
        root: numbers outside the blocks.
        frozen: (rows, columns) of each frozen linear weight in blocks.
    """

    numbers: int
    bytes: int
    trainable: int
    trainable_bytes: int
    sizes: tuple[int, ...]
    block: int
    block_trainable: int
    root: int
    frozen: tuple[tuple[int, int], ...]


def _prefixes(model: nn.Module, kinds: Sequence[Kind]) -> list[str]:
    if kinds:
        return [f"{kind.path}.{kind.start + i}." for kind in kinds for i in range(kind.blocks)]
    from .checkpointing import blocks_of

    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] + "." for block in blocks_of(model)]


@lru_cache(maxsize=16)
def weights_of(case: Case) -> Weights:
    """Of the whole model with its LoRA layers."""
    kinds = kinds_of(resolved(case.spec))
    model = build(case, tuple(kind.blocks for kind in kinds))
    named = dict(model.named_parameters())
    owner: dict[str, str] = {}
    for prefix in _prefixes(model, kinds):
        owner |= {name: prefix for name in named if name.startswith(prefix)}
    blocks: dict[str, tuple[int, int]] = {}
    for name, prefix in owner.items():
        total, trained = blocks.get(prefix, (0, 0))
        p = named[name]
        blocks[prefix] = total + p.numel(), trained + p.numel() * p.requires_grad
    trained_parameters = [p for p in named.values() if p.requires_grad]
    frozen = [
        (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in owner and not module.weight.requires_grad
    ]
    largest = max(blocks.values(), default=(0, 0))
    return Weights(
        sum(p.numel() for p in named.values()),
        sum(p.numel() * p.element_size() for p in named.values()),
        sum(p.numel() for p in trained_parameters),
        sum(p.numel() * p.element_size() for p in trained_parameters),
        tuple(p.numel() for p in trained_parameters),
        largest[0],
        largest[1],
        sum(p.numel() for name, p in named.items() if name not in owner),
        tuple(frozen),
    )


def quantised_bytes(weights: Weights, base: str) -> int:
    """Of all parameters, the frozen linear ones in blocks quantised."""
    if base == "none":
        return weights.bytes
    stored = sum(
        rows * columns / 2 + rows * columns / 16 if base == "nf4" else rows * columns + 4 * rows
        for rows, columns in weights.frozen
    )
    return round(weights.bytes - 2 * sum(rows * columns for rows, columns in weights.frozen) + stored)


def dequantised_bytes(weights: Weights, base: str) -> int:
    """Of the largest quantised layer in bf16, which is there while it runs."""
    return 0 if base == "none" else 2 * max((rows * columns for rows, columns in weights.frozen), default=0)


@dataclass(frozen=True)
class Rest:
    """What is on the device between calls.

    Attributes:
        weights: "parameters", "master weights" and "replica".
        gradients: while they are there.
        optimizer: its states.
        rollout, forward, backward: what a call brings besides its trace: "unsharded block" and "temporaries".
        step: what the optimiser's step brings.
        step_traffic: bytes that it reads and writes.
    """

    weights: Vector
    gradients: Vector
    optimizer: Vector
    rollout: Vector
    forward: Vector
    backward: Vector
    step: Vector
    step_traffic: float


def state_bytes_8bit(sizes: Sequence[int]) -> int:
    """Of bitsandbytes' 8-bit AdamW."""
    return sum(8 * n if n < 4096 else 2 * n + 8 * math.ceil(n / 256) for n in sizes)


def rest(settings: Settings, case: Case) -> Rest:
    """From the sizes of the parameters, and a trace of the optimiser's step.

    Args:
        settings: what is planned.
        case: of the training call.
    """
    weights = weights_of(case)
    shards = settings.fsdp if settings.is_sharded else 1
    master = settings.dtype == "fp32_master"
    at_rest: Vector = {}
    if settings.is_sharded:
        at_rest["master weights" if master else "parameters"] = weights.numbers * (4 if master else 2) / shards
    elif master:
        at_rest["master weights"] = weights.bytes
    else:
        at_rest["parameters"] = quantised_bytes(weights, settings.base)
    if settings.replica:
        at_rest["replica"] = 2 * weights.numbers
    width = 4 if master else 2
    gradients = weights.trainable * width / shards if settings.is_sharded else weights.trainable_bytes
    states, step, traffic = _optimizer(settings, case, weights)
    gathered: Vector = {}
    backward: Vector = {}
    if settings.is_sharded:
        whole = settings.strategy == "shard_grad_op"
        gathered = {"unsharded block": 2 * (weights.numbers if whole else 2 * weights.block + weights.root)}
        backward = {"unsharded block": gathered["unsharded block"] + 2 * weights.block_trainable}
    elif settings.base != "none":
        gathered = backward = {"temporaries": dequantised_bytes(weights, settings.base)}
    return Rest(
        at_rest,
        {"gradients": gradients},
        {"optimizer": states / shards},
        {} if settings.replica else gathered,
        gathered,
        backward,
        {"temporaries": step / shards},
        traffic / shards,
    )


def _optimizer(settings: Settings, case: Case, weights: Weights) -> tuple[float, float, float]:
    """States, temporaries of a step, and its traffic; of all shards together."""
    scale = 2 if settings.dtype == "fp32_master" and case.dtype == "bf16" else 1
    if settings.optimizer == "adamw_8bit":
        states = state_bytes_8bit(weights.sizes)
        # Gradient read, weight and states read and written.
        return states, 0, 2 * states + 3 * weights.trainable_bytes * scale
    found = step_figures(case, settings.optimizer.removeprefix("adamw_"))
    if "optimizer" in settings.offload:
        return 0, 0, found[2] * scale
    return found[0] * scale, found[1] * scale, found[2] * scale


@lru_cache(maxsize=32)
def step_figures(case: Case, optimizer: str) -> tuple[float, float, float]:
    """States, temporaries and traffic of AdamW's step, traced with the smallest input."""
    spec = resolved(case.spec)
    size = [
        8 * step * patch if not kinds_of(spec) else step * patch
        for step, patch in zip(spec.compression[1:], spec.patch[1:], strict=True)
    ]
    frames = (spec.patch[0] - 1) * spec.compression[0] + 1
    tiny = replace(case, frames=frames, height=size[0], width=size[1], rows=1, text_tokens=None, optimizer=optimizer)
    blocks = compose(tiny, "none")
    static, moments = blocks.static(), blocks.moments("optimizer")
    # A fused step makes nothing, and so has no moment.
    more = max((sum(moment.bytes.values()) for moment in moments), default=0.0) - sum(static.values())
    return static["optimizer"], max(0.0, more), sum(blocks.traffic("optimizer").values())


def without(moment: Vector, static: Vector) -> Vector:
    """A moment of a trace less the parameters, gradients and states that were there before it."""
    kept = {key: value for key, value in static.items() if key != "temporaries"}
    return added((1, moment), (-1, kept))
