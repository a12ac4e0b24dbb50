"""One pass: what a rollout holds whose own calls have the gradients, and whether that fits and is faster."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .blocks import Blocks
from .budget import CATEGORIES, Phase
from .calls import Vector, added, numbers
from .margins import limit
from .quantised import quantised
from .settings import GIB, Settings
from .sharding import weights_of

if TYPE_CHECKING:
    from .iteration import Iteration

# Of a sum of gradients; the trainer's LoRA layers are as wide.
SUM_BYTES = 4
# From the first call until the advantages are known.
WHILE = ("rollout", "decode", "rewards", "replay forward", "replay backward")


def held(iteration: "Iteration", blocks: Blocks, kind: str) -> Vector:
    """Bytes beside one call's: the graphs of all others ("retain"), or gradients of every sample ("reweight")."""
    settings = iteration.settings
    if kind == "reweight":
        denoisers = 2 if iteration.second and settings.second_expert == "trained" else 1
        return {"gradients": denoisers * settings.samples * weights_of(iteration.replay).trainable * SUM_BYTES}
    kept = blocks.kept()
    if settings.quantization == "fp8":
        casts = quantised(iteration.replay, settings.quantization).casts
        kept = added((1, kept), (1, {"saved": sum(casts)}))
    return {"saved": (iteration.training_calls - 1) * sum(kept.values())}


def applied(iteration: "Iteration", blocks: Blocks, kind: str, phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """The phases of two passes as they are in one: the replay's calls are some of the rollout's."""
    if kind == "2":
        return tuple(phases)
    settings, more = iteration.settings, held(iteration, blocks, kind)
    drawn = -(-settings.samples // settings.rollout_batch) * settings.num_steps
    left = max(0.0, 1 - iteration.training_calls / drawn)
    found = []
    for phase in phases:
        if phase.name in WHILE:
            line = tuple((share, _with(budget, more)) for share, budget in phase.timeline)
            seconds = phase.seconds * (left if phase.name == "rollout" else 1)
            phase = replace(phase, budget=_with(phase.budget, more), seconds=seconds, timeline=line)
        found.append(phase)
    return tuple(found)


def choose(iteration: "Iteration", blocks: Blocks, phases: Sequence[Phase]) -> tuple[str, tuple[str, ...]]:
    """What `passes` comes to, "2", "retain" or "reweight", and why.

    Args:
        iteration: what is planned.
        blocks: under the policy that was picked.
        phases: of two passes.
    """
    settings = iteration.settings
    if settings.passes != "1":
        return settings.passes, ()
    room, reasons = limit(settings, settings.gpu_gib), []
    seconds = {phase.name: phase.seconds for phase in phases}
    forward, backward = seconds["replay forward"], seconds["replay backward"]
    # A KL's model is called in both.
    two, one = settings.trained_share * (forward + backward), backward + (forward / 2 if settings.kl_reference else 0)
    if one >= two:
        why = f"all samples' backward takes {one:.1f} s, and the replay of the best and worst {two:.1f} s"
        return "2", (f"passes 2: {why}",)
    for kind in ("retain", "reweight"):
        if kind == "reweight" and (why := unweighable(settings)):
            reasons.append(f"passes reweight: not with {why}")
            continue
        top = max(phase.bytes for phase in applied(iteration, blocks, kind, phases))
        takes = f"takes {top / GIB:.1f} GiB, and {room / GIB:.1f} GiB are there"
        if top <= room:
            saved = f"a replay's {two:.1f} s become {one:.1f} s"
            return kind, (f"passes {kind}: it {takes}; {saved}", *reasons)
        reasons.append(f"passes {kind} {takes}")
    return "2", (f"passes 2: {'; '.join(reasons)}",)


def check(settings: Settings) -> None:
    """Raises ValueError for one pass with what it cannot have."""
    if settings.passes == "2":
        return
    if settings.is_sharded or settings.sequence_parallel > 1 or settings.blocks_to_swap != 0:
        raise ValueError(f'passes: got "{settings.passes}" with shards, split samples or blocks to swap, want "2"')
    if settings.passes == "reweight" and (why := unweighable(settings)):
        raise ValueError(f'passes: got "reweight" with {why}, want "2" or "retain"')


def unweighable(settings: Settings) -> str:
    """Why gradients of every sample cannot be had or would cost what they save; "" where they can."""
    if not settings.lora:
        return "full fine-tuning"
    return "a KL, whose gradient takes a backward of its own" if settings.kl_reference else ""


def _with(budget: dict[str, int], more: Vector) -> dict[str, int]:
    whole = numbers(added((1, budget), (1, more)))
    return {name: whole[name] for name in CATEGORIES if name in whole}
