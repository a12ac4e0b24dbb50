"""Which checkpoint policy a plan uses: the one asked for, or by `auto` the cheapest that fits, and why."""

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, replace

from ...activations import checkpointing
from ...activations.operators import GROUPS
from .blocks import Blocks, compose
from .calls import Summary, small
from .cases import Case, block_paths, kinds_of, resolved
from .quantised import quantised
from .settings import GIB, Settings
from .solve import BlockFigures, GroupFigures, solve
from .verdict import HOST

UNET = (
    "the blocks are the UNet's ResNets and transformer blocks, as diffusers checkpoints them; what lies between them"
    " (projections, samplers, its first middle ResNet) is always kept"
)
# Of the capacity: less than that left over is not worth another solution.
CLOSE = 0.01
# How torch refuses a policy that keeps what the model changes in place.
MUTATED = "has been mutated"
# What a choice may recompute more than the cheapest, as a share of that.
GAP = 0.001


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
    found = _of_kinds(settings, case) if kinds_of(resolved(case.spec)) else _parts(settings, case)
    if settings.quantization != "fp8":
        return found
    casts = quantised(case, settings.quantization).casts
    return [replace(one, saved_bytes=one.saved_bytes + size) for one, size in zip(found, casts, strict=True)]


def _of_kinds(settings: Settings, case: Case) -> list[BlockFigures]:
    """Those of a kind have the same."""
    plain, full = compose(case, "none"), compose(case, "full")
    found: list[BlockFigures] = []
    for i, kind in enumerate(plain.kinds):
        more = plain.more["none", i]
        [path] = more.made
        saved = sum(plain.slope(lambda s: s.saved, "none", i).values())
        found += [_figures(settings, more, path, round(full.input_bytes(i)), saved)] * kind.blocks
    return found


def _parts(settings: Settings, case: Case) -> list[BlockFigures]:
    """Of a model that is traced as a whole: each of its blocks is a kind of its own."""
    plain, handed = small(case, "none"), small(case, "full").handed
    return [_figures(settings, plain, path, handed.get(path, 0), 0) for path in block_paths(resolved(case.spec))]


def _figures(settings: Settings, found: Summary, path: str, inputs: int, saved: float) -> BlockFigures:
    groups = {}
    for name in GROUPS:
        flops, traffic = found.work.get(path, {}).get(name, (0.0, 0.0))
        cost = seconds(settings, {name: flops}, {name: traffic})
        size, kept = found.made.get(path, {}).get(name, (0, 0))
        if size or cost:
            groups[name] = GroupFigures(size, kept, cost)
    total = max(round(saved), sum(group.saved_bytes for group in groups.values()))
    return BlockFigures(inputs, total, groups)


def named(settings: Settings, case: Case) -> Picked:
    """The policy that the settings name.

    Raises:
        ValueError: "first:k" with more blocks than there are.
    """
    host = "block_inputs" in settings.offload
    first = settings.first_blocks()
    if first is None:
        return Picked(settings.checkpointing, compose(case, settings.checkpointing, host_inputs=host), ())
    kinds = kinds_of(resolved(case.spec))
    if not kinds:
        try:
            return Picked(settings.checkpointing, compose(case, checkpointing.FirstBlocks(first)), ())
        except ValueError as error:
            raise ValueError(f'checkpointing: got "{settings.checkpointing}", {error}') from error
    count = sum(kind.blocks for kind in kinds)
    if first > count:
        raise ValueError(f'checkpointing: got "{settings.checkpointing}", want at most the model\'s {count} blocks')
    each: list[Hashable] = [*["full"] * first, *["none"] * (count - first)]
    return Picked(settings.checkpointing, compose(case, each, host_inputs=host), ())


def automatic(
    settings: Settings,
    case: Case,
    peak: Callable[[Blocks], float],
    replay_seconds: Callable[[Blocks], float],
    limit: float,
    among: Collection[str] | None = None,
) -> Picked:
    """The cheapest policy under which the replay's peak stays under the limit, or the smallest there is.

    Block inputs wait on the host if the settings say so, or where all on the device takes longer or does not fit.

    Args:
        settings: what is planned.
        case: of the training call.
        peak: exact bytes of the replay under some policy.
        replay_seconds: of all replays; copies to the host overlap with computing.
        limit: capacity less the margins.
        among: names of the policies that a block may have; None: every choice of what it keeps.
    """
    asked = "block_inputs" in settings.offload
    plain = compose(case, "none")
    there = f"{limit / GIB:.1f} GiB are there"
    if peak(plain) <= limit:
        kept = ", and no block has inputs to keep on the host" if asked else ""
        why = f"policy none: nothing needs recomputation ({peak(plain) / GIB:.1f} GiB, {there}){kept}"
        return Picked("none", plain, (why,))
    reasons = [f"without checkpointing the replay takes {peak(plain) / GIB:.1f} GiB, and {there}"]
    places = (asked,) if asked or not plain.kinds else (False, True)
    least = {host: compose(case, "full", host_inputs=host) for host in places}
    fitting: dict[bool, Picked] = {}
    for host, full in least.items():
        found = _solved(settings, case, peak, limit, host, among)
        if found is None and peak(full) <= limit:
            found = Picked("full", full, (f"policy full fits: {peak(full) / GIB:.1f} GiB",))
        if found is not None:
            fitting[host] = found
    if fitting:
        # Of equals the first, which is on the device.
        host = min(fitting, key=lambda host: replay_seconds(fitting[host].blocks))
        if host and not asked:
            reasons.append(_why_host(least[False], fitting, peak, replay_seconds))
        picked = fitting[host]
        return Picked(picked.name + (HOST if host and not asked else ""), picked.blocks, (*reasons, *picked.reasons))
    host = min(least, key=lambda host: peak(least[host]))
    full = least[host]
    if host and not asked:
        reasons.append(f"full checkpointing takes {peak(least[False]) / GIB:.1f} GiB")
        reasons.append(f"block inputs wait in host memory: {peak(full) / GIB:.1f} GiB")
    reasons.append(f"the least recomputation can do is {(peak(full) - limit) / GIB:.1f} GiB too much")
    return Picked("full" + (HOST if host and not asked else ""), full, tuple(reasons))


def _why_host(
    full: Blocks,
    fitting: dict[bool, Picked],
    peak: Callable[[Blocks], float],
    replay_seconds: Callable[[Blocks], float],
) -> str:
    if False not in fitting:
        return f"block inputs wait in host memory: with them on the device it takes {peak(full) / GIB:.1f} GiB at least"
    here, away = (replay_seconds(fitting[host].blocks) for host in (False, True))
    return (
        f"block inputs wait in host memory, which leaves more to keep: {away:.0f} s of replay, and {here:.0f} s with"
        " them on the device"
    )


def _solved(
    settings: Settings,
    case: Case,
    peak: Callable[[Blocks], float],
    limit: float,
    host: bool,
    among: Collection[str] | None,
) -> Picked | None:
    blocks = figures(settings, case)
    full = compose(case, "full", host_inputs=host)
    # A model that is traced as a whole has its inputs on the device.
    host = host and bool(full.kinds)
    inputs = 2 * max(b.input_bytes for b in blocks) if host else sum(b.input_bytes for b in blocks)
    outside = peak(full) - inputs - max(b.saved_bytes for b in blocks)
    budget = limit - outside
    best: tuple[float, Picked] | None = None
    allowed = among
    # What solve counts of a recomputation is a bound, and the peak may be elsewhere: the budget is corrected by both.
    for _ in range(4):
        try:
            solution = solve(blocks, max(0, int(budget)), offload=host, gap=GAP, among=allowed)
        except ValueError:
            break
        # Another policy more is another trace, and changes little.
        allowed = allowed or {*checkpointing.NAMED, *map(str, solution.policies)}
        chosen: list[Hashable] = ["none" if keep is None else str(keep) for keep in solution.policies]
        keys = [_key(policy, keep) for policy, keep in zip(chosen, solution.policies, strict=True)]
        # Without kinds of blocks the whole is traced again.
        given = keys if full.kinds else checkpointing.PerBlock(solution.policies)
        try:
            found = compose(case, given, host_inputs=host)
        except RuntimeError as error:
            if MUTATED not in str(error):
                raise
            # CogVideoX turns queries in place: what a block keeps would be another when it is computed again.
            allowed = {"full"}
            continue
        left = limit - peak(found)
        if left >= 0:
            if best is not None and best[0] <= solution.cost:
                break
            share = 100 * solution.cost / solution.forward_cost
            why = f"auto: {peak(found) / GIB:.1f} of {limit / GIB:.1f} GiB, {share:.0f} % of the forward is recomputed"
            each = solution.explanation.splitlines()[2:] if full.kinds else [UNET]
            best = solution.cost, Picked(_name(chosen, bool(full.kinds)), found, (why, *each))
            if left < CLOSE * limit:
                break
        budget += left
    return None if best is None else best[1]


def _key(name: Hashable, keep: checkpointing.Keep | None) -> Hashable:
    return name if keep is None or name in checkpointing.NAMED else keep


def _name(policies: list[Hashable], in_order: bool) -> str:
    """Runs of equal policies, or how many there are of each where nearly every block is of a kind of its own."""
    runs: list[tuple[Hashable, int]] = []
    for policy in policies if in_order else sorted(policies, key=str):
        if runs and runs[-1][0] == policy:
            runs[-1] = policy, runs[-1][1] + 1
        else:
            runs.append((policy, 1))
    return str(runs[0][0]) if len(runs) == 1 else ", ".join(f"{count} x {policy}" for policy, count in runs)
