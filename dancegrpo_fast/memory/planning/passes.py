"""One pass: what a rollout holds whose own calls have the gradients, and whether that fits and is faster."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .blocks import Blocks
from .budget import CATEGORIES, Phase
from .calls import Vector, added, numbers
from .cases import rows_of
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
        sums = denoisers * settings.samples * weights_of(iteration.replay).trainable * SUM_BYTES
        # What the model made of each row, until the loss has its advantage; guidance has it twice.
        rows = calls(settings) * rows_of(settings, settings.micro_batch)
        outputs = rows * iteration.latents / (settings.samples * (settings.num_steps + 1))
        return {"gradients": sums, "trajectories": round(outputs)}
    kept = blocks.kept()
    if settings.quantization == "fp8":
        casts = quantised(iteration.replay, settings.quantization).casts
        kept = added((1, kept), (1, {"saved": sum(casts)}))
    return {"saved": (math.ceil(calls(settings)) - 1) * sum(kept.values())}


def calls(settings: Settings) -> float:
    """Model calls of the rollout that are trained on, as many as can be expected.

    A call has the samples of one step, and each sample draws its own steps: a step's share of them fills no whole
    number of calls. Two passes pack the pairs of all steps.
    """
    steps, trained = settings.num_steps, max(1, round(settings.num_steps * settings.timestep_fraction))
    noisy, samples = max(trained, steps - 1), settings.samples
    share, expected = trained / noisy, 0.0
    for count in range(1, samples + 1):
        if share == 1:
            likely = float(count == samples)
        else:
            drawn = math.lgamma(samples + 1) - math.lgamma(count + 1) - math.lgamma(samples - count + 1)
            likely = math.exp(drawn + count * math.log(share) + (samples - count) * math.log1p(-share))
        expected += likely * math.ceil(count / settings.micro_batch)
    return noisy * expected


def applied(iteration: "Iteration", blocks: Blocks, kind: str, phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """The phases of two passes as they are in one: the replay's calls are some of the rollout's."""
    if kind == "2":
        return tuple(phases)
    settings, more = iteration.settings, held(iteration, blocks, kind)
    drawn = -(-settings.samples // settings.rollout_batch) * settings.num_steps
    many = calls(settings) / iteration.training_calls
    left = max(0.0, 1 - calls(settings) / drawn)
    shares = {"rollout": left, "replay forward": many, "replay backward": many * _backwards(settings, kind)}
    found = []
    for phase in phases:
        if phase.name in WHILE:
            line = tuple((share, _with(budget, more)) for share, budget in phase.timeline)
            seconds = phase.seconds * shares.get(phase.name, 1)
            phase = replace(phase, budget=_with(phase.budget, more), seconds=seconds, timeline=line)
        found.append(phase)
    return tuple(found)


def _backwards(settings: Settings, kind: str) -> float:
    """Share of the calls with gradients that a backward goes through: of graphs, those of samples that were chosen."""
    return 1.0 if kind == "reweight" else min(1.0, settings.trained_share * settings.micro_batch)


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
    two, many = settings.trained_share * (forward + backward), calls(settings) / iteration.training_calls
    for kind in ("retain", "reweight"):
        if kind == "reweight" and (why := unweighable(settings)):
            reasons.append(f"passes reweight: not with {why}")
            continue
        # A KL's model is called in both.
        one = many * (_backwards(settings, kind) * backward + (forward / 2 if settings.kl_reference else 0))
        if one >= two:
            reasons.append(f"passes {kind}: its backward takes {one:.1f} s, and a replay {two:.1f} s")
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
    for what in ("denoiser", "expert", "block_inputs"):
        if what in settings.offload:
            raise ValueError(f'passes: got "{settings.passes}" with offload {what}, want "2"')
    if settings.passes == "reweight" and (why := unweighable(settings)):
        raise ValueError(f'passes: got "reweight" with {why}, want "2" or "retain"')


def unweighable(settings: Settings) -> str:
    """Why gradients of every sample cannot be had or would cost what they save; "" where they can."""
    if not settings.lora:
        return "full fine-tuning"
    if settings.block_ops != "off":
        return f'block_ops "{settings.block_ops}"'
    return "a KL, whose gradient takes a backward of its own" if settings.kl_reference else ""


def _with(budget: dict[str, int], more: Vector) -> dict[str, int]:
    whole = numbers(added((1, budget), (1, more)))
    return {name: whole[name] for name in CATEGORIES if name in whole}
