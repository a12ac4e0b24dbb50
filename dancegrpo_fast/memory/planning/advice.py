"""What one change gives: the plan again with it, and nothing that was not recomputed."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from ...activations.streaming import BUFFERS
from .blocks import Blocks
from .budget import Advice, Plan
from .cases import Kind, kinds_of, resolved
from .settings import GIB, Settings
from .verdict import HOST

# From the most recomputation to none.
LADDER = ("full", "attention", "matmul", "none")
MORE_GIB = 10


class Knob(NamedTuple):
    """A changed setting in words; whether the checkpoint policy stays as it was picked."""

    text: str
    changes: dict[str, Any]
    same_policy: bool = True


def knobs(plan: Plan, *, host: bool, count: int, thorough: bool) -> Iterator[Knob]:
    """What can be changed; `host`: block inputs wait there; `thorough` also has what takes seconds each.

    `count`: of the model's blocks, 0 where they are of no kind.
    """
    s = plan.settings
    yield from _policies(plan, host, thorough)
    top, experts = plan.peak.name, resolved(s.model).experts
    away = [("denoiser", "weights wait on the host while other models run")]
    away += [("expert", "the denoiser whose turn it is not waits on the host")] if experts > 1 else []
    away += [("vae", "the VAE waits on the host")] if top != "decode" else []
    away += [("rewards", "reward models wait on the host")] if s.rewards else []
    for name, text in away:
        if name not in s.offload:
            yield Knob(f"offload {name}: {text}", {"offload": (*s.offload, name)})
    if not host and plan.policy != "none" and kinds_of(resolved(s.model)):
        yield Knob("offload block_inputs: they wait on the host", {"offload": (*s.offload, "block_inputs")})
    if s.text_encoders == "resident":
        yield Knob("text encoders freed after encoding", {"text_encoders": "freed"})
    if s.text_encoders != "precomputed" and top == "text encoding":
        yield Knob("text embeddings computed before", {"text_encoders": "precomputed"})
    if s.vae_tiling == "off" and (top == "decode" or thorough):
        yield Knob("VAE tiling", {"vae_tiling": "on"})
    if s.optimizer == "adamw_foreach":
        yield Knob("AdamW fused instead of foreach", {"optimizer": "adamw"})
    if s.optimizer.startswith("adamw") and s.optimizer != "adamw8bit":
        yield Knob("8-bit AdamW", {"optimizer": "adamw8bit"})
    most = count - BUFFERS
    if s.lora and not s.is_sharded and s.blocks_to_swap == 0 and most > 0:
        for some in sorted({-(-most // 2), most}):
            yield Knob(f"blocks_to_swap {some}: frozen weights wait on the host", {"blocks_to_swap": some})
    if s.is_sharded and plan.gradient_sync == "update":
        yield Knob("gradients reduced after every call", {"gradient_sync": "call"})
    if s.is_sharded:
        yield Knob(
            "no replica" if s.rollout_replica else "a bf16 replica for rollouts",
            {"rollout_replica": not s.rollout_replica},
        )
    if thorough or not plan.fits(s.gpu_gib):
        yield from _traced_anew(s)
    if thorough:
        if s.micro_batch > 1:
            yield Knob("micro_batch halved", {"micro_batch": s.micro_batch // 2})
        if not s.lora:
            yield Knob("LoRA of rank 32 instead of all weights", {"lora": 32, "rollout_replica": False})


def _traced_anew(s: Settings) -> Iterator[Knob]:
    """What needs other traces, and so as long as the plan itself."""
    if s.lora and s.quantization == "none":
        for name in ("nf4", "int8", "fp8"):
            yield Knob(f"frozen weights in {name}", {"quantization": name})
    if s.quantization == "none":
        strategy = "full_shard" if s.strategy == "none" else s.strategy
        yield Knob(f"{2 * s.fsdp} GPUs under FSDP", {"fsdp": 2 * s.fsdp, "strategy": strategy})
    if s.block_ops == "off" and kinds_of(resolved(s.model)):
        # Of frozen layers the GELU's input is not kept anyway.
        again = "all" if s.lora else "gelu"
        yield Knob(f"block ops, lossless, recompute {again}", {"block_ops": "lossless", "recompute": again})


def _policies(plan: Plan, host: bool, thorough: bool) -> Iterator[Knob]:
    s = plan.settings
    stay = tuple(name for name in s.offload if name != "block_inputs")
    for policy in ("none", "full", *(("attention", "matmul") if thorough else ())):
        away = host and policy != "none"
        if policy != plan.policy.removesuffix(HOST):
            offload = (*stay, "block_inputs") if away else stay
            yield Knob(
                f"checkpointing {policy}{HOST if away else ''}", {"checkpointing": policy, "offload": offload}, False
            )
    if s.checkpointing != "auto":
        yield Knob("checkpointing auto", {"checkpointing": "auto"}, False)
    elif plan.policy != "none" and thorough:
        more = s.gpu_gib + MORE_GIB
        offload = (*stay, "block_inputs") if host else stay
        text = f"{MORE_GIB} GiB more{HOST if host else ''}, checkpointing auto"
        yield Knob(text, {"gpu_gib": more, "offload": offload}, False)


def _labels(kinds: Sequence[Kind]) -> list[str]:
    """What the blocks of each kind are called; a UNet has no kinds."""
    if len(kinds) < 2:
        return ["blocks"] * len(kinds)
    single = any(kind.path.startswith("single") for kind in kinds)
    names = ("double blocks", "single blocks") if single else ("blocks of dual attention", "blocks of plain attention")
    return list(names)


def partial(plan: Plan, blocks: Blocks, mixed: Callable[[list[Hashable]], Plan]) -> Iterator[tuple[str, Plan]]:
    """The plan with some blocks' policy changed, in words.

    Of each kind of block: in what is left, one policy up and to "none", for as many of the commonest policy as fit; and
    one policy down for all blocks of the one that recomputes least, or for as many as make the plan fit.

    Args:
        plan: as asked for.
        blocks: with their policies.
        mixed: plans with a policy for each block.
    """
    gib = plan.settings.gpu_gib

    def changed(places: Sequence[int], policy: str) -> Plan:
        each = list(blocks.policies)
        for place in places:
            each[place] = policy
        return mixed(each)

    for i, (kind, label) in enumerate(zip(blocks.kinds, _labels(blocks.kinds), strict=True)):
        members: dict[str, list[int]] = {}
        for place, (of, policy) in enumerate(zip(blocks.order, blocks.policies, strict=True)):
            if of == i and policy in LADDER:
                members.setdefault(str(policy), []).append(place)
        if not members:
            continue

        common = max(members, key=lambda policy: (len(members[policy]), -LADDER.index(policy)))
        if plan.fits(gib) and common != "none":
            places = members[common]
            # The last are computed again first, beside what all others keep.
            choices = [places[len(places) - n :] for n in range(len(places) + 1)]
            for target in dict.fromkeys((LADDER[LADDER.index(common) + 1], "none")):
                count, other = _most(changed, choices, target, gib)
                if other is not None:
                    yield _words(count, kind.blocks, label, common, target), other
        least = max(members, key=LADDER.index)
        if least != "full":
            target = LADDER[LADDER.index(least) - 1]
            places = members[least]
            count, other = len(places), changed(places, target)
            if not plan.fits(gib) and other.fits(gib):
                kept, most = _most(changed, [places[: count - n] for n in range(count)], target, gib)
                count, other = count - kept, most or other
            yield _words(count, kind.blocks, label, least, target), other


def _words(count: int, of: int, label: str, now: str, then: str) -> str:
    some = f"{count} {label}" if count < of else f"all {of} {label}"
    if then == "none":
        return f"drop checkpointing ({now}) on {some}"
    return f"checkpointing {then} instead of {now} on {some}"


def _most(
    changed: Callable[[Sequence[int], str], Plan], choices: Sequence[Sequence[int]], policy: str, gib: float
) -> tuple[int, Plan | None]:
    """The last of the choices, after the first, with which it fits, and the plan; bytes grow along them."""
    low, high, best = 0, len(choices) - 1, None
    middle = high
    while low < high:
        if (found := changed(choices[middle], policy)).fits(gib):
            low, best = middle, found
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return low, best


def dominated(plan: Plan, found: Sequence[Advice]) -> list[str]:
    """Says of a checkpoint policy that another takes no more memory and no more time."""
    better = [a for a in found if a.text.startswith("checkpointing ") and a.gib <= 0 and a.seconds <= 0]
    return [
        f"checkpointing {plan.policy} is dominated: {a.text.removeprefix('checkpointing ')} takes {-a.gib:.2f} GiB and"
        f" {-100 * a.seconds:.1f} % of the time less"
        for a in better[:1]
    ]


def advice(
    plan: Plan,
    blocks: Blocks,
    again: Callable[[Settings, bool], Plan],
    mixed: Callable[[list[Hashable]], Plan],
    *,
    thorough: bool = False,
) -> tuple[Advice, ...]:
    """Every change's effect, as it is printed, ranked: if the plan does not fit by GiB, else by time and then GiB.

    What saves neither bytes nor time is left out, and of changes with one effect all but the first.

    Args:
        plan: as asked for.
        blocks: of its replay.
        again: plans other settings, with the policy that was picked or with theirs.
        mixed: plans the same settings with a policy for each block.
        thorough: also try what needs other traces.
    """
    found: list[tuple[str, Plan]] = list(partial(plan, blocks, mixed))
    for knob in knobs(plan, host=blocks.host_inputs, count=len(blocks.order), thorough=thorough):
        try:
            other = again(plan.settings.changed(**knob.changes), knob.same_policy)
        except ValueError:
            # The model cannot have it.
            continue
        chosen = f": {other.policy}" if other.settings.checkpointing == "auto" and not knob.same_policy else ""
        found.append((knob.text + chosen, other))
    fitting = plan.fits(plan.settings.gpu_gib)
    seen: Counter[tuple[float, float]] = Counter()
    ranked: list[tuple[bool, Advice]] = []
    for text, other in found:
        # Zero has no sign.
        gib = round((other.total_bytes - plan.total_bytes) / GIB, 2) + 0.0
        share = round(other.seconds / plan.seconds - 1, 3) + 0.0
        seen[gib, share] += 1
        if (gib >= 0 and share >= 0) or seen[gib, share] > 1:
            continue
        fits = other.fits(other.settings.gpu_gib)
        change = "" if fits == fitting else ", fits then" if fits else ", does not fit"
        ranked.append((fits, Advice(text + change, gib, share)))
    # What no longer fits comes last.
    ranked.sort(key=lambda item: (not item[0] and fitting, item[1].seconds if fitting else item[1].gib, item[1].gib))
    return tuple(item for _, item in ranked)
