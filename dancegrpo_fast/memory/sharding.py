"""What rests on one GPU: weights, gradients and states, whole or under FSDP, quantised or not. Formulas, all exact but
where they say otherwise.

FSDP over N: every parameter, gradient and state is 1/N. On the device besides, as "unsharded block": in a forward, the
largest block twice (the one that runs and the next, which is prefetched) and the parameters outside the blocks; in a
backward also the gradients of the largest block until they are reduced. "shard_grad_op" gathers once and keeps all.

8-bit AdamW: two bytes a parameter and two float32 scales for 256 of them; tensors of fewer than 4096 numbers stay in
float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from .phases import Case, Kind, Vector, added, build, kinds_of, resolved
from .quantised import quantised
from .settings import Settings
from .trace import trace


@dataclass(frozen=True)
class Weights:
    """Sizes of a model's parameters.

    Attributes:
        numbers, bytes: of all parameters.
        trainable, trainable_bytes: of those that are trained.
        sizes, dtypes: numbers in each trained tensor, and of what type.
        block: numbers in the largest block, and `block_trainable` the trained ones among them.
        root: numbers outside the blocks.
    """

    numbers: int
    bytes: int
    trainable: int
    trainable_bytes: int
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    block: int
    block_trainable: int
    root: int


def _prefixes(model: nn.Module, kinds: Sequence[Kind]) -> list[str]:
    if kinds:
        return [f"{kind.path}.{kind.start + i}." for kind in kinds for i in range(kind.blocks)]
    from .checkpointing import blocks_of

    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] + "." for block in blocks_of(model)]


def weights_of(case: Case) -> Weights:
    """Of the whole model with its LoRA layers."""
    # Sizes of the call change no weight.
    return _weights_of(replace(case, frames=1, height=1, width=1, rows=1, text_tokens=None, kernel="flash", train=True))


@lru_cache(maxsize=16)
def _weights_of(case: Case) -> Weights:
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
    largest = max(blocks.values(), default=(0, 0))
    return Weights(
        sum(p.numel() for p in named.values()),
        sum(p.numel() * p.element_size() for p in named.values()),
        sum(p.numel() for p in trained_parameters),
        sum(p.numel() * p.element_size() for p in trained_parameters),
        tuple(p.numel() for p in trained_parameters),
        tuple(p.dtype for p in trained_parameters),
        largest[0],
        largest[1],
        sum(p.numel() for name, p in named.items() if name not in owner),
    )


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
    base = None if settings.base == "none" else quantised(case, settings.base)
    at_rest: Vector = {}
    if settings.is_sharded:
        at_rest["master weights" if master else "parameters"] = weights.numbers * (4 if master else 2) / shards
    elif master:
        at_rest["master weights"] = weights.bytes
    else:
        at_rest["parameters"] = weights.bytes if base is None else base.stored
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
    elif base is not None:
        gathered = backward = {"temporaries": base.largest}
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
    found = step_figures(weights.sizes, weights.dtypes, settings.optimizer.removeprefix("adamw_"))
    if "optimizer" in settings.offload:
        return 0, 0, found[2] * scale
    return found[0] * scale, found[1] * scale, found[2] * scale


@lru_cache(maxsize=32)
def step_figures(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], optimizer: str) -> tuple[float, float, float]:
    """States, temporaries and traffic of AdamW's step on tensors of so many numbers, traced without their model."""
    held = nn.ParameterList(
        nn.Parameter(torch.empty(n, dtype=dtype, device="meta")) for n, dtype in zip(sizes, dtypes, strict=True)
    )
    found = trace(held, {}, optimizer=optimizer, call=lambda: held[0].sum())
    more = found.peak_of("optimizer").bytes - sum(found.live("backward").values())
    traffic = sum(found.bytes_by_group["optimizer"].values())
    return found.live("load")["optimizer"], max(0, more), traffic


def without(moment: Vector, static: Vector) -> Vector:
    """A moment of a trace less the parameters, gradients and states that were there before it."""
    kept = {key: value for key, value in static.items() if key != "temporaries"}
    return added((1, moment), (-1, kept))
