"""Which checkpoint policy a plan uses: the one asked for, or by `auto` the cheapest that fits, and why."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from . import checkpointing
from .blocks import Blocks, compose
from .phases import Case, kinds_of, resolved
from .settings import GIB, Settings
from .solve import BlockFigures, GroupFigures, solve

# The trace's groups of operators for checkpointing's.
_GROUPS = {"convolution": "matmul", "copy": "other"}
# Of the capacity: less than that left over is not worth another solution.
CLOSE = 0.01


@dataclass(frozen=True)
class Picked:
    """A policy: its name, its blocks, and the reasons."""

    name: str
    blocks: Blocks
    reasons: tuple[str, ...]


def seconds(settings: Settings, flops: dict[str, float], traffic: dict[str, float]) -> float:
    """Of counted work over the assumed rates."""
    rates = settings.rates
    found = sum(traffic.values()) / (rates.bandwidth_gb_s * 1e9)
    for group, count in flops.items():
        found += count / ((rates.attention_tflops if group == "attention" else rates.tflops) * 1e12)
    return found


def figures(settings: Settings, case: Case) -> list[BlockFigures]:
    """Of every block; costs are seconds of its forward, by group."""
    kinds = kinds_of(resolved(case.spec))
    plain, full = compose(case, "none"), compose(case, "full")
    found: list[BlockFigures] = []
    bare = plain.ladders["none"]
    for i, kind in enumerate(kinds):
        saved = bare.slope(lambda s: s.saved)[i]
        flops = bare.slope(lambda s: s.flops["forward"])[i]
        traffic = bare.slope(lambda s: s.traffic["forward"])[i]
        made = bare.base.made.get(str(i), {})
        groups = {}
        for name in checkpointing.GROUPS:
            ours = [group for group in {*flops, *traffic} if _GROUPS.get(group, group) == name]
            cost = seconds(settings, {g: flops.get(g, 0) for g in ours}, {g: traffic.get(g, 0) for g in ours})
            size, kept = made.get(name, (0, 0))
            if size or cost:
                groups[name] = GroupFigures(size, kept, max(cost, 0.0))
        total = max(round(sum(saved.values())), sum(group.saved_bytes for group in groups.values()))
        found += [BlockFigures(round(full.input_bytes(i)), total, groups)] * kind.blocks
    return found


def named(settings: Settings, case: Case) -> Picked:
    """The policy that the settings name.

    Raises:
        ValueError: "first:k" with more blocks than there are.
    """
    host = "block_inputs" in settings.offload
    first = settings.first_blocks()
    if first is None:
        return Picked(settings.policy, compose(case, settings.policy, host_inputs=host), ())
    kinds = kinds_of(resolved(case.spec))
    if not kinds:
        try:
            return Picked(settings.policy, compose(case, checkpointing.FirstBlocks(first)), ())
        except ValueError as error:
            raise ValueError(f'policy: got "{settings.policy}", {error}') from error
    count = sum(kind.blocks for kind in kinds)
    if first > count:
        raise ValueError(f'policy: got "{settings.policy}", want at most the model\'s {count} blocks')
    each: list[Hashable] = [*["full"] * first, *["none"] * (count - first)]
    return Picked(settings.policy, compose(case, each, host_inputs=host), ())


def automatic(settings: Settings, case: Case, peak: Callable[[Blocks], float], limit: float) -> Picked:
    """The cheapest policy under which the replay's peak stays under the limit, or the smallest there is.

    Args:
        settings: what is planned.
        case: of the training call.
        peak: exact bytes of the replay under some policy.
        limit: capacity less the margins.
    """
    host = "block_inputs" in settings.offload
    plain, full = compose(case, "none"), compose(case, "full", host_inputs=host)
    there = f"{limit / GIB:.1f} GiB are there"
    if peak(plain) <= limit and not host:
        return Picked(
            "none", plain, (f"policy none: nothing needs recomputation ({peak(plain) / GIB:.1f} GiB, {there})",)
        )
    reasons = [f"without checkpointing the replay takes {peak(plain) / GIB:.1f} GiB, and {there}"]
    if plain.kinds:
        picked = _solved(settings, case, peak, limit, host)
        if picked is not None:
            return Picked(picked.name, picked.blocks, (*reasons, *picked.reasons))
    if peak(full) <= limit:
        return Picked("full", full, (*reasons, f"policy full fits: {peak(full) / GIB:.1f} GiB"))
    if not host and plain.kinds:
        reasons.append(f"full checkpointing takes {peak(full) / GIB:.1f} GiB")
        offloaded = replace(full, host_inputs=True)
        if peak(offloaded) < peak(full):
            full = offloaded
            reasons.append(f"block inputs wait in host memory: {peak(full) / GIB:.1f} GiB")
    over = peak(full) - limit
    if over > 0:
        reasons.append(f"the least recomputation can do is {over / GIB:.1f} GiB too much")
    return Picked("full" + (" + block inputs on the host" if full.host_inputs else ""), full, tuple(reasons))


def _solved(settings: Settings, case: Case, peak: Callable[[Blocks], float], limit: float, host: bool) -> Picked | None:
    blocks = figures(settings, case)
    full = compose(case, "full", host_inputs=host)
    inputs = 2 * max(b.input_bytes for b in blocks) if host else sum(b.input_bytes for b in blocks)
    outside = peak(full) - inputs - max(b.saved_bytes for b in blocks)
    budget = limit - outside
    best: tuple[float, Picked] | None = None
    # What solve counts of a recomputation is a bound, and the peak may be elsewhere: the budget is corrected by both.
    for _ in range(4):
        try:
            solution = solve(blocks, max(0, int(budget)), offload=host)
        except ValueError:
            break
        chosen: list[Hashable] = ["none" if keep is None else str(keep) for keep in solution.policies]
        keys = [_key(policy, keep) for policy, keep in zip(chosen, solution.policies, strict=True)]
        found = compose(case, keys, host_inputs=host)
        left = limit - peak(found)
        if left >= 0:
            if best is not None and best[0] <= solution.cost:
                break
            share = 100 * solution.cost / solution.forward_cost
            why = f"auto: {peak(found) / GIB:.1f} of {limit / GIB:.1f} GiB, {share:.0f} % of the forward is recomputed"
            best = solution.cost, Picked(_name(chosen), found, (why, *solution.explanation.splitlines()[2:]))
            if left < CLOSE * limit:
                break
        budget += left
    return None if best is None else best[1]


def _key(name: Hashable, keep: checkpointing.Keep | None) -> Hashable:
    return name if keep is None or name in checkpointing.NAMED else keep


def _name(policies: list[Hashable]) -> str:
    """Runs of equal policies."""
    runs: list[tuple[Hashable, int]] = []
    for policy in policies:
        if runs and runs[-1][0] == policy:
            runs[-1] = policy, runs[-1][1] + 1
        else:
            runs.append((policy, 1))
    return str(runs[0][0]) if len(runs) == 1 else ", ".join(f"{count} x {policy}" for policy, count in runs)
