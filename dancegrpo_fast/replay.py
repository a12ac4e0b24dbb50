"""The update: the same model calls as in the rollout, `policy_loss`, backward."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .models import Conditioning
from .ops.policy_loss import PolicyLoss, PolicyMetrics, policy_loss
from .rollout import Policy, chunks, guided_output, select
from .trajectory import Trajectory
from .transitions import TransitionTable


class Item(NamedTuple):
    """One row of a model call: the samples that share its input, and their step."""

    samples: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class Objective:
    """The loss's settings, and the reference model of its KL."""

    clip_range: float
    advantage_clip: float
    kl_weight: float
    ratio_norm: bool
    reference: nn.Module | None = None
    without_adapters: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Experience:
    """A scored rollout.

    Attributes:
        trajectory: B samples over T steps.
        conditioning: one row per prompt.
        advantages: float32 `[B]` on the device.
        advantages_host: the same numbers.
        group_size: samples per prompt.
        steps: the steps each sample is trained on, B lists of K.
        shared_first_step: step 0 was computed once per prompt.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    advantages: Tensor
    advantages_host: Sequence[float]
    group_size: int
    steps: Sequence[Sequence[int]]
    shared_first_step: bool


@dataclass
class Tally:
    """What an iteration's updates did; tensors stay on the device until the iteration ends.

    Attributes:
        sums: `PolicyMetrics` summed over samples, the first of them their number.
        max_dev: largest `|ratio - 1|` of the iteration, and `first_max_dev` of its first update.
        grad_norms: one per update, before clipping.
        counts: rows of model calls and the work that was not done.
    """

    sums: Tensor | None = None
    max_dev: Tensor | None = None
    first_max_dev: Tensor | None = None
    grad_norms: list[Tensor] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("model_rows", "padded_rows", "shared_rows_saved", "zero_advantage_skipped", "backwards_skipped"), 0
        )
    )

    def add(self, metrics: PolicyMetrics, first: bool) -> None:
        """Adds the metrics of one loss; `first` marks the first update after a rollout."""
        sums = torch.stack([metrics.samples, *(value * metrics.samples for value in metrics[1:])])
        self.sums = sums if self.sums is None else self.sums + sums
        dev = metrics.ratio_max_dev
        self.max_dev = dev if self.max_dev is None else torch.maximum(self.max_dev, dev)
        if first:
            self.first_max_dev = dev if self.first_max_dev is None else torch.maximum(self.first_max_dev, dev)


def backward_update(
    policy: Policy,
    denoiser: nn.Module,
    table: TransitionTable,
    data: Experience,
    samples: Sequence[int],
    objective: Objective,
    backward: Callable[[Tensor], None],
    tally: Tally,
    first: bool,
) -> bool:
    """Accumulates the gradient of the mean loss over `samples` and their steps; whether there was any.

    Samples whose advantage is exactly 0 have no gradient and are not replayed, unless a KL pulls on them.
    """
    steps = len(data.steps[0])
    per_pair = 1.0 / (len(samples) * steps)
    active = [s for s in samples if data.advantages_host[s] != 0.0 or objective.kl_weight > 0]
    tally.counts["zero_advantage_skipped"] += (len(samples) - len(active)) * steps
    items: list[tuple[int, Item]] = []
    shared: dict[int, list[int]] = {}
    for turn in range(steps):
        for s in active:
            step = data.steps[s][turn]
            if step == 0 and data.shared_first_step:
                shared.setdefault(s // data.group_size, []).append(s)
            else:
                items.append((s % policy.rows, Item((s,), step)))
    # A shared first step sat in its prompt's row.
    items += [(prompt % policy.rows, Item(tuple(group), 0)) for prompt, group in sorted(shared.items())]
    tally.counts["shared_rows_saved"] += sum(len(group) - 1 for group in shared.values())
    changed = False
    for losses in _losses(policy, denoiser, table, data, items, objective, tally, per_pair):
        for loss in losses:
            tally.add(loss.metrics, first)
        # Knowing that every sample was clipped costs nothing on the CPU; on a GPU it would be a host sync.
        if losses[0].loss.device.type == "cpu" and not any(bool(loss.has_grad.any()) for loss in losses):
            tally.counts["backwards_skipped"] += 1
            continue
        backward(torch.stack([loss.loss for loss in losses]).sum())
        changed = True
    return changed


def _losses(
    policy: Policy,
    denoiser: nn.Module,
    table: TransitionTable,
    data: Experience,
    items: Sequence[tuple[int, Item]],
    objective: Objective,
    tally: Tally,
    per_pair: float,
) -> Iterator[list[PolicyLoss]]:
    """One list of losses per model call, so that the caller frees its graph before the next."""
    latents, device = data.trajectory.latents, data.trajectory.latents.device
    times = table.times.to(device, torch.float32)

    def loss(index: Tensor, step: Tensor, outputs: Sequence[Tensor | None]) -> PolicyLoss:
        output, uncond, reference = outputs
        assert output is not None
        rollout_outputs = data.trajectory.outputs
        return policy_loss(
            latents[index, step],
            output,
            latents[index, step + 1],
            table,
            step,
            data.trajectory.log_probs[index, step],
            data.advantages[index],
            clip_range=objective.clip_range,
            advantage_clip=objective.advantage_clip,
            uncond_output=uncond,
            guidance_scale=None if uncond is None else policy.guidance_scale,
            reference_output=reference,
            kl_weight=objective.kl_weight,
            ratio_norm=objective.ratio_norm,
            old_output=None if rollout_outputs is None else rollout_outputs[index, step],
            weight=len(index) * per_pair,
        )

    for call in _plan(items, policy, device):
        tally.counts["model_rows"] += policy.rows
        tally.counts["padded_rows"] += policy.rows - call.used
        index, step = call.samples, call.steps
        inputs = (latents[index, step], times[step], select(data.conditioning, index // data.group_size))
        outputs: list[Tensor | None] = [*policy(denoiser, *inputs), None]
        if objective.kl_weight > 0:
            frozen = denoiser if objective.reference is None else objective.reference
            with torch.no_grad(), objective.without_adapters():
                outputs[2] = guided_output(*policy(frozen, *inputs), policy.guidance_scale)

        losses = []
        if len(call.single) == policy.rows:
            losses.append(loss(index, step, outputs))
        elif len(call.single) > 0:
            kept = call.single
            losses.append(loss(index[kept], step[kept], [None if o is None else o[kept] for o in outputs]))
        for row, shared_step, group in call.shared:
            shape = (len(group), *latents.shape[2:])
            expanded = [None if o is None else o[row].expand(shape) for o in outputs]
            losses.append(loss(group, torch.full_like(group, shared_step), expanded))
        yield losses


class _Call(NamedTuple):
    """One model call: what its rows compute, which of them stand for one sample, and which for several."""

    used: int
    samples: Tensor
    steps: Tensor
    single: Tensor
    shared: list[tuple[int, int, Tensor]]


def _plan(items: Sequence[tuple[int, Item]], policy: Policy, device: torch.device) -> list[_Call]:
    """The calls of an update, their indices brought to the device in one copy."""
    numbers: list[int] = []

    def keep(values: Iterable[int]) -> slice:
        start = len(numbers)
        numbers.extend(values)
        return slice(start, len(numbers))

    plan = []
    for places in pack(items, policy):
        rows = fill(places, policy.rows)
        plan.append(
            (
                len(places),
                keep(item.samples[0] for item in rows),
                keep(item.step for item in rows),
                keep(row for row, item in places.items() if len(item.samples) == 1),
                [(row, item.step, keep(item.samples)) for row, item in places.items() if len(item.samples) > 1],
            )
        )
    there = torch.tensor(numbers, dtype=torch.int64).to(device)
    return [
        _Call(used, there[index], there[step], there[single], [(row, t, there[group]) for row, t, group in shared])
        for used, index, step, single, shared in plan
    ]


def pack(items: Sequence[tuple[int, Item]], policy: Policy) -> Iterator[dict[int, Item]]:
    """Deals (row in the rollout, item) pairs out to model calls: for each call, what sits in which of its rows.

    Where the model's bits depend on the row, every item keeps the row it had in the rollout and some rows stay empty;
    where they do not, calls are filled without gaps.
    """
    if policy.rows_are_equal:
        for part in chunks(len(items), policy.rows):
            yield {row: item for row, (_, item) in enumerate(items[part])}
        return
    queues: dict[int, list[Item]] = {}
    for row, item in items:
        queues.setdefault(row, []).append(item)
    for turn in range(max(map(len, queues.values()), default=0)):
        yield {row: queue[turn] for row, queue in sorted(queues.items()) if turn < len(queue)}


def fill(places: Mapping[int, Item], rows: int) -> list[Item]:
    """What every row of a call computes: its item, or in an empty row another one again."""
    spare = next(iter(places.values()))
    return [places.get(row, spare) for row in range(rows)]
