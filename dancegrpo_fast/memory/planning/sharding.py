"""What rests on one GPU: weights, gradients and states, whole or under FSDP2, quantised or not.

FSDP2 over N, as the trainer splits a denoiser: by blocks, the rest being the root; gathered in bf16, reduced in
float32. Every parameter and state is 1/N. Gradients are 1/N with `gradient_sync` "call"; with "update" all of them are
there unreduced, in float32, from an update's first call to its last. Beside the shards, of block i with B_i bytes
gathered and T_i bytes of float32 gradients, R bytes in the root, as "unsharded block":
    forward, before block i     R + B_i, its gather's buffer B_i, and the one before: B_(i-1), of the first block R
    forward, in block i         R + B_i, and its gather's buffer, which stays until the next block has been gathered
    backward, in block i        R + B_i, the prefetched B_(i-1), and the reduction's input T_(i+1) unless it waits
    backward, outside           R, and the neighbouring block's gather or reduction
In a backward the block's own gradients are there besides, in the parameters' dtype, as the trace makes them. With
"shard_grad_op", and in rollouts with a replica, what was gathered stays: R + B_0 + ... + B_i, and nothing is
prefetched. So torch's fully_shard has it (tests/memory/test_fsdp_transients.py), but for the rounding up of shards and
1/N of a block that a gather casts. A UNet's figure is an upper bound: what the largest block brings, at every moment.
Pools that CUDA's allocator keeps for FSDP's streams are not in it.

8-bit AdamW: two bytes a parameter and two float32 scales for 256 of them; tensors of fewer than 4096 numbers stay in
float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from ...activations.checkpointing import block_paths
from ...activations.streaming import packed
from ...optimizers import probe
from ...recipe import TrainSettings
from ..trace.recorder import tensors_in
from ..trace.tracer import trace
from .blocks import Blocks
from .calls import ENTRY, Moment, Vector, added
from .cases import Case, Kind, kinds_of, resolved, whole_model
from .quantised import quantised
from .settings import Settings
from .swapping import Swap, swap_of

# Bytes of a gradient that is reduced.
REDUCE = 4


class Part(NamedTuple):
    """Of a model's parameters: how its names start, bytes, how many numbers are trained, and bytes that may stream."""

    prefix: str
    bytes: int
    trainable: int
    streams: int


@dataclass(frozen=True)
class Weights:
    """Sizes of a model's parameters.

    Attributes:
        numbers, bytes: of all parameters.
        trainable, trainable_bytes: of those that are trained.
        sizes, dtypes: numbers in each trained tensor, and of what type.
        blocks: in the order in which the model runs them.
        root: what is outside the blocks.
        tables: bytes of buffers and other tensors of modules, which nobody shares.
    """

    numbers: int
    bytes: int
    trainable: int
    trainable_bytes: int
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    blocks: tuple[Part, ...]
    root: Part
    tables: int


def _prefixes(model: nn.Module, kinds: Sequence[Kind]) -> list[str]:
    if kinds:
        return [f"{kind.path}.{kind.start + i}." for kind in kinds for i in range(kind.blocks)]
    return [path + "." for path in block_paths(model)]


def weights_of(case: Case) -> Weights:
    """Of the whole model with its LoRA layers."""
    # Sizes of the call change no weight.
    case = replace(case, frames=1, height=1, width=1, rows=1, text_tokens=None, sequence_parallel=1)
    return _weights_of(replace(case, kernel="flash", train=True, fresh=False, quantization="none"))


@lru_cache(maxsize=16)
def _weights_of(case: Case) -> Weights:
    kinds = kinds_of(resolved(case.spec))
    model = whole_model(case)
    named = dict(model.named_parameters())
    held: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in (*_prefixes(model, kinds), "")}
    for name, p in named.items():
        ends = [i + 1 for i, letter in enumerate(name) if letter == "."]
        held[next((name[:end] for end in ends if name[:end] in held), "")].append(p)
    parts = [
        Part(
            prefix,
            sum(p.nbytes for p in inside),
            sum(p.numel() for p in inside if p.requires_grad),
            packed([p.nbytes for p in inside if not p.requires_grad])[1],
        )
        for prefix, inside in held.items()
    ]
    trained_parameters = [p for p in named.values() if p.requires_grad]
    tables = tensors_in(held for m in model.modules() for held in (*m._buffers.values(), *vars(m).values()))
    return Weights(
        sum(p.numel() for p in named.values()),
        sum(p.numel() * p.element_size() for p in named.values()),
        sum(p.numel() for p in trained_parameters),
        sum(p.numel() * p.element_size() for p in trained_parameters),
        tuple(p.numel() for p in trained_parameters),
        tuple(p.dtype for p in trained_parameters),
        tuple(parts[:-1]),
        parts[-1],
        sum(t.numel() * t.element_size() for t in {id(t): t for t in tables}.values()),
    )


@dataclass(frozen=True)
class Rest:
    """What is on the device between calls.

    Attributes:
        weights: "parameters" or "master weights".
        gradients: while calls add to them, and `reduced` those that are there at the optimiser's step.
        optimizer: its states, and masters beside the parameters.
        call: what a call brings besides its trace.
        step: what the optimiser's step brings.
        step_traffic: bytes that it reads and writes.
        swap: what waits on the host, which is not in the weights.
    """

    weights: Vector
    gradients: Vector
    reduced: Vector
    optimizer: Vector
    call: Vector
    step: Vector
    step_traffic: float
    swap: Swap


def stored_width(case: Case) -> int:
    """How many times as wide shards are as what is gathered of them: masters are gathered in bf16."""
    return 2 if case.dtype == "bf16_autocast" else 1


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
    base = None if settings.quantization == "none" else quantised(case, settings.quantization)
    master = settings.precision == "fp32_master"
    wider = stored_width(case)
    stored = weights.tables + (weights.bytes * wider / shards if base is None else base.stored)
    swap = swap_of(settings, [part.streams for part in weights.blocks] if base is None else base.streams)
    stored -= swap.saved
    reduced = weights.trainable_bytes * wider / shards
    late = settings.is_sharded and settings.gradient_sync == "update"
    stepped, masters = weights, 0
    if settings.precision == "bf16_master":
        masters = REDUCE * sum(n for n, dtype in zip(weights.sizes, weights.dtypes, strict=True) if dtype.itemsize < 4)
        wide = REDUCE * weights.trainable
        # Those of the narrow weights go as these come, but where they are DDP's buckets.
        reduced = (wide + (weights.trainable_bytes if settings.fsdp > 1 and not settings.is_sharded else 0)) / shards
        stepped = replace(weights, trainable_bytes=wide, dtypes=(torch.float32,) * len(weights.sizes))
    states, step, traffic = _optimizer(settings, case, stepped)
    rests = {"optimizer": states / shards} | ({"master weights": masters / shards} if masters else {})
    return Rest(
        {"master weights" if master else "parameters": stored},
        {"gradients": REDUCE * weights.trainable if late else weights.trainable_bytes * wider / shards},
        {"gradients": reduced},
        rests,
        {"temporaries": base.largest} if base is not None and base.largest else {},
        {"temporaries": step / shards},
        traffic / shards,
        swap,
    )


class Gathers:
    """Bytes that FSDP2 has on the device in one phase besides the shards.

    Args:
        settings: with shards.
        weights: of the model as it is gathered.
        phase: "rollout", "forward" or "backward".
    """

    def __init__(self, settings: Settings, weights: Weights, phase: str) -> None:
        self.replica = settings.rollout_replica and phase == "rollout"
        self.stays = settings.strategy == "shard_grad_op" or self.replica
        self.late = settings.gradient_sync == "update"
        self.backward = phase == "backward"
        # Only the first call of a rollout gathers what stays.
        self.least = weights.bytes if self.stays and phase == "rollout" else 0
        self.parts, self.root = weights.blocks, weights.root
        self.sizes = [part.bytes for part in weights.blocks]
        self.width = weights.trainable_bytes / weights.trainable

    def copies(self, i: int) -> int:
        """Gathered parameters while block i runs."""
        return self.root.bytes + sum(self.sizes[0 if self.stays else i : i + 1])

    def _reduction(self, i: int) -> int:
        """The input of block i's reduction; where calls add up gradients, it takes the place of their sum."""
        return 0 if self.late or i == len(self.parts) else REDUCE * self.parts[i].trainable

    def entry(self, i: int) -> int:
        """While block i is copied out of its gather's buffer, in a forward."""
        return max(self.least, self.copies(i) + self.sizes[i] + (self.sizes[i - 1] if i else self.root.bytes))

    def inside(self, i: int) -> int:
        """While block i runs."""
        if not self.backward:
            return max(self.least, self.copies(i) + self.sizes[i])
        ahead = self.sizes[i - 1] if i and not self.stays else 0
        return self.copies(i) + ahead + self._reduction(i + 1)

    def before(self) -> int:
        """Before the first block, which in a backward comes last."""
        if self.backward:
            return self.root.bytes + self._reduction(0)
        return max(self.least, 2 * self.root.bytes)

    def after(self) -> int:
        """After the last block, which in a backward comes first."""
        there = self.root.bytes + (sum(self.sizes) if self.stays else 0)
        return there + (0 if self.backward and self.stays else self.sizes[-1])

    def most(self) -> Vector:
        """At any moment, with the gradients of the root and of one block."""
        count = range(len(self.parts))
        inside = [self.inside(i) if self.backward else max(self.inside(i), self.entry(i)) for i in count]
        found = self._named(max(self.before(), self.after(), *inside))
        if self.backward:
            found["gradients"] = self.width * (self.root.trainable + max(part.trainable for part in self.parts))
        return found

    def _named(self, size: int) -> Vector:
        if not self.replica:
            return {"unsharded block": size}
        return {"replica": self.least, "unsharded block": size - self.least}

    def moments(self, blocks: Blocks, phase: str) -> list[Moment]:
        """The phase's moments with these bytes, and those of gathers between them."""
        if not blocks.kinds:
            return [_more(moment, self.most()) for moment in blocks.moments(phase)]
        # Moments outside the blocks are the first and the last.
        entries = {} if self.backward else {self._at(moment): moment for moment in blocks.moments(phase + ENTRY)}
        found: list[Moment] = []
        seen = False
        for moment in blocks.moments(phase):
            at = self._at(moment)
            if at is None:
                found.append(_more(moment, self._named(self.after() if seen != self.backward else self.before())))
                continue
            seen = True
            if at in entries:
                found.append(_more(entries[at], self._named(self.entry(at))))
            found.append(_more(moment, self._named(self.inside(at))))
        return found

    def _at(self, moment: Moment) -> int | None:
        """Which block it is in."""
        name = moment.module + "."
        return next((i for i, part in enumerate(self.parts) if name.startswith(part.prefix)), None)


def _more(moment: Moment, bytes_: Vector) -> Moment:
    return moment._replace(bytes=added((1, moment.bytes), (1, bytes_)))


# Tensors as large as the trained ones and of their type that some optimisers keep; another step than a probe's may ask
# for packages that are not here.
STATES = {"lion": 1, "prodigy": 4}


def state_bytes(settings: Settings, dtype: torch.dtype) -> float:
    """Of each trained number of this type, under an optimiser that is not AdamW.

    Raises:
        ValueError: there is no such optimiser here.
    """
    if settings.optimizer == "other":
        return settings.state_bytes
    if settings.optimizer in STATES:
        return STATES[settings.optimizer] * dtype.itemsize
    name = {"adafactor": "torch.optim:Adafactor"}.get(settings.optimizer, settings.optimizer)
    tried = TrainSettings(1, 1, 2, 1, optimizer=name, weight_decay=0.0)
    try:
        return probe(tried, dtype).bytes_per_number
    except ValueError as error:
        raise ValueError(str(error).removeprefix("train.")) from error


def _optimizer(settings: Settings, case: Case, weights: Weights) -> tuple[float, float, float]:
    """States, temporaries of a step, and its traffic; of all shards together."""
    scale = stored_width(case)
    if settings.optimizer == "adamw8bit":
        states: float = state_bytes_8bit(weights.sizes)
        # Gradient read, weight and states read and written.
        return states, 0, 2 * states + 3 * weights.trainable_bytes * scale
    if not settings.optimizer.startswith("adamw"):
        pairs = zip(weights.sizes, weights.dtypes, strict=True)
        each = {dtype: state_bytes(settings, dtype) for dtype in set(weights.dtypes)}
        kept = sum(n * each[dtype] for n, dtype in pairs)
        kept *= 1 if settings.optimizer == "other" else scale
        return kept, 0, 2 * kept + 3 * weights.trainable_bytes * scale
    kind = "foreach" if settings.optimizer == "adamw_foreach" else "fused"
    found = step_figures(weights.sizes, weights.dtypes, kind)
    return found[0] * scale, found[1] * scale, found[2] * scale


@lru_cache(maxsize=32)
def step_figures(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], optimizer: str) -> tuple[float, float, float]:
    """States, temporaries and traffic of AdamW's step on tensors of so many numbers, traced without their model."""
    if len(sizes) < 3 or len(set(dtypes)) > 1:
        return _step(sizes, dtypes, optimizer)
    # Linear in the numbers and in the tensors, of which there may be thousands.
    one, two = (_step((sum(sizes) - n + 1, *[1] * (n - 1)), dtypes[:n], optimizer) for n in (1, 2))
    more = len(sizes) - 1
    return one[0] + more * (two[0] - one[0]), one[1] + more * (two[1] - one[1]), one[2] + more * (two[2] - one[2])


def _step(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], optimizer: str) -> tuple[float, float, float]:
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
