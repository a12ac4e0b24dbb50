"""The cheapest recomputation that fits a budget: which block keeps what."""

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import NamedTuple, TypeAlias

from ...activations.checkpointing import KEEPABLE, Keep
from ...activations.operators import GROUPS

GIB = 2**30
# Sums are rounded, so that a bound equal to a limit may come out a little above.
ROUNDING = 1 - 1e-12
PROMISING = 8


@dataclass(frozen=True)
class GroupFigures:
    """One op group of a block.

    Attributes:
        kept_bytes: what its ops return, which is what keeping the group costs in a checkpointed block.
        saved_bytes: the part of it that autograd keeps without checkpointing.
        cost: of computing it again, in seconds or FLOPs; the same unit everywhere.
    """

    kept_bytes: int
    saved_bytes: int
    cost: float


@dataclass(frozen=True)
class BlockFigures:
    """One block.

    Attributes:
        input_bytes: of the activations that it is called with.
        saved_bytes: what autograd keeps besides without checkpointing.
        groups: figures by op group; a group that is missing keeps nothing and costs nothing.
    """

    input_bytes: int
    saved_bytes: int
    groups: Mapping[str, GroupFigures] = field(hash=False)

    def check(self, where: str) -> None:
        """Refuses what no block can have."""
        if unknown := sorted(set(self.groups) - set(GROUPS)):
            raise ValueError(f"{where}.groups: got {', '.join(unknown)}, want some of {', '.join(GROUPS)}")
        figures = {"input_bytes": self.input_bytes, "saved_bytes": self.saved_bytes}
        for name, group in self.groups.items():
            figures |= {f"groups.{name}.{key}": value for key, value in vars(group).items()}
        for key, value in figures.items():
            if isinstance(value, bool) or not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{where}.{key}: got {value}, want a finite number of at least 0")
        for name, group in self.groups.items():
            if group.saved_bytes > group.kept_bytes:
                raise ValueError(
                    f"{where}.groups.{name}.saved_bytes: got {group.saved_bytes}, want at most kept_bytes,"
                    f" {group.kept_bytes}"
                )
        if sum(group.saved_bytes for group in self.groups.values()) > self.saved_bytes:
            raise ValueError(f"{where}.saved_bytes: got {self.saved_bytes}, want at least the sum over the groups")


class Option(NamedTuple):
    """What one policy means for one block: bytes from forward to backward, bytes while it is computed again, cost."""

    kept: int
    transient: int
    cost: float
    policy: Keep | None


@dataclass(frozen=True)
class Solution:
    """A choice for every block.

    Attributes:
        policies: for each block what it keeps, or None where nothing is computed again.
        kept_bytes: kept by all blocks from forward to backward.
        transient_bytes: of the largest recomputation of one block.
        cost: of all recomputation, in the unit of the figures.
        forward_cost: of one forward of all blocks, in the same unit.
        minimum_bytes: the smallest budget that can be met.
        explanation: the choice in words.
    """

    policies: tuple[Keep | None, ...]
    kept_bytes: int
    transient_bytes: int
    cost: float
    forward_cost: float
    minimum_bytes: int
    explanation: str


def options_of(block: BlockFigures, offload: bool = False, among: Collection[str] | None = None) -> list[Option]:
    """Every choice for one block that no other beats in all of kept bytes, transient bytes and cost.

    With `offload`, inputs of checkpointed blocks are on the host; those of two blocks are on the device at a time. With
    `among`, policies of these names only.
    """
    groups = block.groups
    names = [n for n in KEEPABLE if n in groups and (groups[n].cost > 0 or groups[n].saved_bytes > 0)]
    found = [Option(block.input_bytes + block.saved_bytes, 0, 0, None)]
    for size in range(len(names) + 1):
        for chosen in combinations(names, size):
            if among is not None and str(Keep(chosen)) not in among:
                continue
            kept = sum(groups[name].kept_bytes for name in chosen)
            transient = block.saved_bytes - sum(groups[name].saved_bytes for name in chosen)
            cost = sum(group.cost for name, group in groups.items() if name not in chosen)
            inputs = (0, 2 * block.input_bytes) if offload else (block.input_bytes, 0)
            found.append(Option(kept + inputs[0], transient + inputs[1], cost, Keep(chosen)))
    # Stable, so that of equals the one that keeps whole, or fewer groups, stays.
    best: list[Option] = []
    for option in sorted(found, key=lambda option: option[:3]):
        if not any(all(a <= b for a, b in zip(other[:3], option[:3], strict=True)) for other in best):
            best.append(option)
    return best


Kinds: TypeAlias = list[tuple[list[int], list[Option]]]
# Kept bytes, cost, and the options that led there, the last first.
State: TypeAlias = tuple[int, float, tuple[Option, "State | None"] | None]


class _Relaxation:
    """A lower bound on the cost of the blocks that are still open, if a block could be split between two options."""

    def __init__(self, sizes: Sequence[int], choices: Sequence[list[Option]]) -> None:
        self.fronts = [_front(options) for options in choices]
        self.hulls = [_hull(front) for front in self.fronts]
        self.sizes = sizes
        # From each kind on: what one block's step along its hull saves a byte, its bytes, and its kind, the best first.
        steps = [
            ((a.cost - b.cost) / (b.kept - a.kept), b.kept - a.kept, k)
            for k, hull in enumerate(self.hulls)
            for a, b in pairwise(hull)
        ]
        steps.sort(reverse=True)
        self.steps = [[step for step in steps if step[2] >= kind] for kind in range(len(sizes))]

    def __call__(self, kind: int, done: int, budget: int) -> float:
        """With `done` blocks of this kind chosen, all of those before, and `budget` bytes left; inf if none fits."""
        cost = 0.0
        for k in range(kind, len(self.sizes)):
            count, least = self.sizes[k] - (done if k == kind else 0), self.hulls[k][0]
            budget -= count * least.kept
            cost += count * least.cost
        if budget < 0:
            return math.inf
        for gain, each, k in self.steps[kind]:
            size = each * (self.sizes[k] - (done if k == kind else 0))
            if size >= budget:
                return cost - gain * budget
            cost -= gain * size
            budget -= size
        return cost


def _front(options: Sequence[Option]) -> list[Option]:
    """By rising bytes and falling cost, none that another beats in both."""
    front: list[Option] = []
    for option in sorted(options, key=lambda option: (option.kept, option.cost, option.transient)):
        if not front or option.cost < front[-1].cost:
            front.append(option)
    return front


def _hull(front: Sequence[Option]) -> list[Option]:
    hull: list[Option] = []
    for c in front:
        while len(hull) > 1:
            a, b = hull[-2:]
            # b lies on or above the line from a to c.
            if (a.cost - b.cost) * (c.kept - a.kept) > (a.cost - c.cost) * (b.kept - a.kept):
                break
            hull.pop()
        hull.append(c)
    return hull


def _cheapest(kinds: Kinds, budget: int, cost_limit: float, gap: float) -> tuple[int, float, list[list[Option]]] | None:
    """Kept bytes, cost and options per kind of the cheapest choice under the limit; of equals the one that keeps less.

    Blocks are added one by one; of partial choices only those stay that none beats in both bytes and cost, and whose
    lower bound does not exceed a choice that is known to fit. With a gap, of those that differ in cost by less than one
    block's share of it the one that keeps least stays.
    """
    sizes = [len(members) for members, _ in kinds]
    bound = _Relaxation(sizes, [options for _, options in kinds])
    least = bound(0, 0, budget)
    if least == math.inf or least * ROUNDING > cost_limit:
        return None
    spare = gap * least
    step = spare / sum(sizes)
    states: list[State] = [(0, 0, None)]
    for k, size in enumerate(sizes):
        for done in range(size):
            # Those that may become the cheapest say what fits; to ask all takes longer than it saves.
            for kept, cost, _ in heapq.nsmallest(PROMISING, states, key=lambda s: s[1] + bound(k, done, budget - s[0])):
                cost_limit = min(cost_limit, cost + _rounded(bound, k, done, budget - kept))
            grown = sorted(
                (
                    (kept + o.kept, cost + o.cost, (o, (kept, cost, path)))
                    for kept, cost, path in states
                    for o in bound.fronts[k]
                ),
                key=lambda state: state[:2],
            )
            states = []
            for state in grown:
                if states and state[1] >= states[-1][1] - step:
                    continue
                lower = state[1] + bound(k, done + 1, budget - state[0])
                if lower * ROUNDING <= cost_limit + spare and lower < math.inf:
                    states.append(state)
            if not states:
                return None
    kept, cost, path = min(states, key=lambda state: (state[1], state[0]))
    chosen: list[Option] = []
    while path is not None:
        option, before = path
        chosen.append(option)
        path = None if before is None else before[2]
    chosen.reverse()
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    # The first blocks are computed again last, when the others' memory is free: the most recomputation goes there.
    per_kind = [
        sorted(chosen[start : start + size], key=lambda o: (-o.cost, o.kept))
        for start, size in zip(starts, sizes, strict=True)
    ]
    return kept, cost, per_kind


def _rounded(bound: _Relaxation, kind: int, done: int, budget: int) -> float:
    """What a choice costs that takes the relaxation's steps block by block and leaves out those that do not fit."""
    cost: float = 0
    counts = {k: bound.sizes[k] - (done if k == kind else 0) for k in range(kind, len(bound.sizes))}
    level = [[0] * counts[k] for k in counts]
    for k, count in counts.items():
        budget -= count * bound.hulls[k][0].kept
        cost += count * bound.hulls[k][0].cost
    if budget < 0:
        return math.inf
    steps = []
    for k in counts:
        hull = bound.hulls[k]
        for i, (a, b) in enumerate(pairwise(hull)):
            steps.append(((a.cost - b.cost) / (b.kept - a.kept), k, i))
    for _, k, i in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        a, b = bound.hulls[k][i : i + 2]
        mine = level[k - kind]
        for block, at in enumerate(mine):
            if at == i and b.kept - a.kept <= budget:
                mine[block], budget, cost = i + 1, budget - (b.kept - a.kept), cost - (a.cost - b.cost)
    return cost


def solve(
    blocks: Sequence[BlockFigures],
    budget_bytes: int,
    *,
    offload: bool = False,
    gap: float = 0.0,
    among: Collection[str] | None = None,
) -> Solution:
    """What each block keeps, so that recomputation costs least within the budget; the optimum, and always the same.

    The budget bounds what all blocks keep plus the largest recomputation of one. Blocks with equal figures are
    interchangeable; those that come first get the most recomputation.

    Args:
        blocks: one entry per block, in the order in which the model runs them.
        budget_bytes: for what blocks keep and compute again; weights, gradients and the rest are not in it.
        offload: inputs of checkpointed blocks wait in host memory.
        gap: the share of its cost that the choice may cost more than the optimum, which is found sooner then.
        among: names of the policies that a block may have; None: every choice of what it keeps.

    Raises:
        ValueError: impossible figures, or a budget below the minimum, which the message gives.
    """
    if not blocks:
        raise ValueError("blocks: got none, want at least one")
    for i, block in enumerate(blocks):
        block.check(f"blocks[{i}]")
    if isinstance(budget_bytes, bool) or not (math.isfinite(budget_bytes) and budget_bytes >= 0):
        raise ValueError(f"budget_bytes: got {budget_bytes}, want a finite number of at least 0")
    if not 0 <= gap < 1:
        raise ValueError(f"gap: got {gap}, want a share of at least 0 and below 1")
    members: list[tuple[BlockFigures, list[int]]] = []
    for i, block in enumerate(blocks):
        same = next((where for known, where in members if known == block), None)
        if same is None:
            members.append((block, [i]))
        else:
            same.append(i)
    kinds: Kinds = [(where, options_of(block, offload, among)) for block, where in members]
    caps = sorted({option.transient for _, options in kinds for option in options})
    allowed = {
        cap: [(where, [option for option in options if option.transient <= cap]) for where, options in kinds]
        for cap in caps
    }
    usable = {cap: found for cap, found in allowed.items() if all(options for _, options in found)}
    minimum = min(
        cap + sum(len(where) * min(option.kept for option in options) for where, options in found)
        for cap, found in usable.items()
    )
    if budget_bytes < minimum:
        raise ValueError(
            f"budget_bytes: got {budget_bytes} ({budget_bytes / GIB:.2f} GiB), want at least {minimum}"
            f" ({minimum / GIB:.2f} GiB): the least that these blocks can keep, and the recomputation of one"
        )
    best: tuple[int, float, list[list[Option]]] | None = None
    room = math.floor(budget_bytes)

    def bound(cap: int) -> float:
        found = usable[cap]
        return _Relaxation([len(where) for where, _ in found], [options for _, options in found])(0, 0, room - cap)

    # Where the least can be hoped for comes first, and leaves little to look for in the others.
    for cap in sorted(usable, key=bound):
        result = _cheapest(usable[cap], room - cap, math.inf if best is None else best[1], gap)
        if result is not None and (best is None or (result[1], result[0]) < (best[1], best[0])):
            best = result
    assert best is not None
    kept, cost, per_kind = best
    chosen: list[Option | None] = [None] * len(blocks)
    for (where, _), options in zip(kinds, per_kind, strict=True):
        for i, option in zip(where, options, strict=True):
            chosen[i] = option
    final = [option for option in chosen if option is not None]
    transient = max(option.transient for option in final)
    forward = sum(group.cost for block in blocks for group in block.groups.values())
    lines = [
        f"keeps {kept / GIB:.2f} GiB and computes one block again in {transient / GIB:.2f} GiB, of"
        f" {budget_bytes / GIB:.2f} GiB (the least is {minimum / GIB:.2f})",
        f"recomputes {100 * cost / forward if forward else 0:.1f} % of the blocks' forward",
    ]
    for (where, _), options in zip(kinds, per_kind, strict=True):
        for policy in dict.fromkeys(option.policy for option in options):
            mine = [(i, option) for i, option in zip(where, options, strict=True) if option.policy == policy]
            each = mine[0][1]
            lines.append(
                f"{len(mine)} of {len(where)} blocks like block {where[0]}: {policy or 'none'},"
                f" {each.kept / GIB:.3f} GiB kept each (blocks {_ranges([i for i, _ in mine])})"
            )
    policies = tuple(option.policy for option in final)
    return Solution(policies, kept, transient, cost, forward, minimum, "\n".join(lines))


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as "0-4, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
