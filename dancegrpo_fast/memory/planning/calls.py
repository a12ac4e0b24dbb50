"""Figures of one model call, from traces of the same model with few blocks.

Bytes and FLOPs are linear in the number of blocks of each kind, so that the smallest model and one with a block more of
a kind say what that block does under its checkpoint policy; the others recompute nothing or, beside a block that is
checkpointed, everything. Models without kinds of blocks are traced as a whole.
"""

import re
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ...activations import checkpointing
from ...progress import working
from ..trace.alone import without_others
from ..trace.result import Storage, Trace
from ..trace.tracer import trace
from . import specs
from .cases import NARROW, Case, Kind, block_paths, build, kinds_of, least_of, resolved

Vector = dict[str, float]

# The trace's names for the planner's.
_CATEGORIES = {"block_inputs": "block inputs", "inputs": "temporaries", "outputs": "temporaries"}


def added(*parts: tuple[float, Mapping[str, float]]) -> Vector:
    """The weighted sum of vectors by category."""
    found: Vector = {}
    for weight, vector in parts:
        for key, value in vector.items():
            found[key] = found.get(key, 0) + weight * value
    return found


def _traced(case: Case, policy: checkpointing.Policy, counts: Sequence[int]) -> Trace:
    spec = resolved(case.spec)
    model = build(case, counts)
    if policy != "none":
        checkpointing.apply(model, policy)
    sizes = case.frames, case.height, case.width, case.rows, case.text_tokens
    # The trainer hands a model inputs of its own dtype.
    dtype = torch.bfloat16 if case.dtype in NARROW else torch.float32
    inputs = specs.inputs(spec, *sizes, dtype=dtype, reference=case.reference)
    autocast = None if case.dtype == "bf16" else torch.bfloat16
    alone = without_others() if case.sequence_parallel > 1 else nullcontext()
    with alone, working(f"tracing {case.spec} with {sum(counts) or 'all'} blocks, checkpointing {policy}"):
        return trace(
            *(model, inputs),
            train=case.train,
            attention=case.kernel,
            grads=not case.fresh,
            autocast=autocast,
            fused_norm=case.fused_norm,
            workspaces=True,
        )


class Moment(NamedTuple):
    """A peak: bytes by category, and what ran."""

    bytes: Vector
    op: str
    module: str


# The block more of `grown`: the second of its kind, so that a model's first and last blocks stay what they are.
EXTRA, PLACE = "extra", 1
ENTRY = " entry"


@dataclass(frozen=True)
class Summary:
    """Of one trace.

    Attributes:
        regions: a peak for each (phase, and kind of block, or the block more, or what is before or after all blocks);
            and (phase + `ENTRY`, the block more) before its forward. Without kinds: for each block's path.
        static: bytes by category before the call.
        kept: bytes by category at the end of its forward.
        flops, traffic: by phase and group.
        launches: by phase.
        saved: what the forward keeps, by group.
        made: what it made and kept by group, of the block more, or by the path of each block of a model without kinds.
        work: of the forward and those blocks by group: FLOPs and traffic.
        handed: of `Trace`.
    """

    regions: dict[tuple[str, str], Moment]
    static: Vector
    kept: Vector
    flops: dict[str, Vector]
    traffic: dict[str, Vector]
    launches: dict[str, int]
    saved: Vector
    made: dict[str, dict[str, tuple[int, int]]]
    work: dict[str, dict[str, tuple[float, float]]]
    handed: dict[str, int]


def _category(storage: Storage, autocast: dict[str, set[int]]) -> str:
    if not autocast:
        return _CATEGORIES.get(storage.category, storage.category)
    if storage.category == "parameters":
        return "master weights"
    if storage.op == "aten._to_copy" and storage.size in autocast.get(storage.module, ()):
        return "parameters"
    return _CATEGORIES.get(storage.category, storage.category)


def _casts(found: Trace) -> dict[str, set[int]]:
    """By module, the sizes of its float32 parameters' copies in bf16."""
    sizes: dict[str, set[int]] = {}
    for storage in found.storages:
        if storage.category == "parameters":
            sizes.setdefault(storage.module, set()).add(storage.size // 2)
    return sizes


def _block(module: str, kinds: Sequence[Kind], counts: Sequence[int]) -> tuple[int, int] | None:
    """Which kind a module belongs to, and which block of it."""
    path, _, rest = module.partition(".")
    first = re.match(r"\d+", rest)
    if first is None:
        return None
    index = int(first[0])
    start = 0
    for i, kind in enumerate(kinds):
        if kind.path != path:
            continue
        if index < start + counts[i]:
            return i, index - start
        start += counts[i]
    return None


def _regions(
    found: Trace, kinds: Sequence[Kind], counts: Sequence[int], extra: int | None
) -> list[tuple[str, str] | None]:
    """Of each event of the trace."""
    regions: list[tuple[str, str] | None] = [None] * len(found.events)
    for phase, (start, stop) in found.phases.items():
        if phase == "load":
            continue
        names = ("after", "before") if phase == "backward" else ("before", "after")
        blocks = [
            _block(event.module, kinds, counts) if event.size > 0 and kinds else None
            for event in found.events[start:stop]
        ]
        inside = [i for i, block in enumerate(blocks) if block is not None]
        current = names[0]
        for i, block in enumerate(blocks):
            if inside and i > inside[-1] and found.events[start + i].size > 0:
                current = names[1]
            elif block is not None:
                current = EXTRA if block == (extra, PLACE) else str(block[0])
            regions[start + i] = phase, current
    return regions


def _by_block(found: Trace, blocks: Collection[str]) -> list[tuple[str, str] | None]:
    """Of each event of a model without kinds: the block that ran last."""
    regions: list[tuple[str, str] | None] = [None] * len(found.events)
    owners: dict[str, str | None] = {}
    for phase, (start, stop) in found.phases.items():
        if phase == "load":
            continue
        current = ""
        for i, event in enumerate(found.events[start:stop], start):
            if event.size > 0:
                if event.module not in owners:
                    owners[event.module] = _owner(event.module, blocks)
                current = owners[event.module] or current
            regions[i] = phase, current
    return regions


def _summary(
    found: Trace, case: Case, kinds: Sequence[Kind], counts: Sequence[int], extra: int | None, blocks: Collection[str]
) -> Summary:
    casts = _casts(found) if case.dtype == "fp32_master" else {}
    # Sharded blocks' gradients are told apart by where the backward of all blocks begins and ends.
    regions = _regions(found, kinds, counts, extra) if kinds or case.fresh else _by_block(found, blocks)
    best: dict[tuple[str, str], int] = {}
    for i, region in enumerate(regions):
        if region is not None and (region not in best or found.timeline[i] > found.timeline[best[region]]):
            best[region] = i
    wanted = {i: region for region, i in best.items()}
    begun = {regions.index(region): region for region in best}
    entries: dict[tuple[str, str], Moment] = {}
    live: Counter[str] = Counter()
    moments: dict[tuple[str, str], Moment] = {}
    ends: dict[int, Vector] = {found.phases[name][1]: {} for name in ("load", _forward(found))}
    for i, (sign, storage) in enumerate(found.changes):
        if i in ends:
            ends[i] = dict(live)
        if i in begun:
            entries[begun[i]] = Moment(dict(live), "all_gather", storage.module)
        live[_category(storage, casts)] += sign * storage.size
        if i in wanted:
            moments[wanted[i]] = Moment(dict(live), storage.op, storage.module)
    if len(found.changes) in ends:
        ends[len(found.changes)] = dict(live)
    if case.fresh:
        _own_gradients(moments, entries)
    for (phase, name), entry in entries.items():
        if name == EXTRA:
            moments[phase + ENTRY, name] = entry
            if _block(moments[phase, name].module, kinds, counts) != (extra, PLACE):
                # An operator of the model itself.
                moments[phase, name] = moments[phase, name]._replace(module=entry.module)
    return Summary(
        moments,
        ends[found.phases["load"][1]],
        ends[found.phases[_forward(found)][1]],
        {phase: dict(groups) for phase, groups in found.flops_by_group.items()},
        {phase: dict(groups) for phase, groups in found.bytes_by_group.items()},
        found.launches,
        dict(found.saved_by_group),
        _made(found, blocks),
        _work(found, blocks),
        found.handed,
    )


def _own_gradients(moments: dict[tuple[str, str], Moment], starts: Mapping[tuple[str, str], Moment]) -> None:
    """Leaves in each moment of the backward the gradients of its block and of what follows all blocks."""
    regions = [region for region in moments if region[0] == "backward" and region[1] != "after"]
    begun = [starts[region].bytes.get("gradients", 0) for region in regions]
    for region, size in zip(regions, begun, strict=True):
        moments[region].bytes["gradients"] = moments[region].bytes.get("gradients", 0) - size + min(begun)


def _forward(found: Trace) -> str:
    return "forward" if "forward" in found.phases else "rollout"


def _owner(module: str, blocks: Collection[str]) -> str | None:
    """The block that a module is or belongs to."""
    ends = [i for i, letter in enumerate(module) if letter == "."]
    return next((module[:end] for end in (*ends, len(module)) if module[:end] in blocks), None)


def _made(found: Trace, blocks: Collection[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """By block and group: bytes that its forward made, and those of them that are kept."""
    kept = {id(storage) for storage in found.kept}
    figures: dict[str, dict[str, tuple[int, int]]] = {}
    for storage in found.storages:
        if storage.phase != "forward" or (path := _owner(storage.module, blocks)) is None:
            continue
        groups = figures.setdefault(path, {})
        made, saved = groups.get(storage.group, (0, 0))
        groups[storage.group] = made + storage.size, saved + (storage.size if id(storage) in kept else 0)
    return figures


def _work(found: Trace, blocks: Collection[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """By block and group: FLOPs of its forward, and bytes that it reads and writes."""
    figures: dict[str, dict[str, tuple[float, float]]] = {}
    for place, work in enumerate((found.flops, found.traffic)):
        for (module, name), count in work.get("forward", Counter()).items():
            if (path := _owner(module, blocks)) is not None:
                groups = figures.setdefault(path, {})
                flops, traffic = groups.get(name, (0.0, 0.0))
                groups[name] = (flops, traffic + count) if place else (flops + count, traffic)
    return figures


def rest_of(policy: Hashable) -> str:
    """The policy of the other blocks in the traces of a block with this one."""
    return "none" if policy == "none" else "full"


@lru_cache(maxsize=64)
def small(case: Case, policy: Hashable) -> Summary:
    """Traces the model with the fewest blocks, or as a whole, all under one of `checkpointing`'s policies."""
    spec = resolved(case.spec)
    kinds, counts = kinds_of(spec), least_of(spec)
    found = _traced(case, policy, counts)  # type: ignore[arg-type]  # hashable, for the cache
    return _summary(found, case, kinds, counts, None, () if kinds else set(block_paths(spec)))


@lru_cache(maxsize=64)
def grown(case: Case, policy: Hashable, kind: int) -> Summary:
    """Traces it with one more block of a kind, under this policy and amid others under `rest_of(policy)`."""
    spec = resolved(case.spec)
    kinds = kinds_of(spec)
    counts = tuple(n + (i == kind) for i, n in enumerate(least_of(spec)))
    chosen: Any = policy
    if policy != rest_of(policy):
        each: list[Any] = [rest_of(policy)] * sum(counts)
        each[sum(counts[:kind]) + PLACE] = policy
        chosen = checkpointing.PerBlock(tuple(each))
    path = f"{kinds[kind].path}.{sum(counts[i] for i in range(kind) if kinds[i].path == kinds[kind].path) + PLACE}"
    return _summary(_traced(case, chosen, counts), case, kinds, counts, kind, (path,))


def numbers(vector: Mapping[str, Any]) -> dict[str, int]:
    """Whole bytes, without what is not there."""
    return {key: round(value) for key, value in vector.items() if round(value) > 0}
