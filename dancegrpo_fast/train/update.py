"""The update: the same model calls as in the rollout, `policy_loss`, backward."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import Conditioning
from ..ops.policy_loss import PolicyLoss, PolicyMetrics, policy_loss
from ..processes import Processes
from ..transitions import TransitionTable
from .draw import Policy, chunks, guided_output, probe, select
from .trajectory import Trajectory


class Item(NamedTuple):
    """One row of a model call: the samples that share its input, and their step."""

    samples: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class Objective:
    """The loss's settings, and the reference model of its KL."""

    clip_range: float | tuple[float, float]
    advantage_clip: float
    kl_weight: float
    ratio_norm: bool
    reference: nn.Module | None = None
    without_adapters: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Experience:
    """The scored samples of one process that are trained on.

    Attributes:
        trajectory: n samples over T steps.
        conditioning: one row per prompt.
        advantages: float32 `[n]` on the device.
        advantages_host: the same numbers.
        prompts: int64 `[n]` on the device, each sample's row of `conditioning`.
        prompts_host: the same numbers.
        rows: the row of the micro-batch in which each sample was drawn.
        steps: the steps each sample is trained on, n lists of K.
        shared_step: the step whose model call was made once per prompt, in row `prompt % rows`; None: none was.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    advantages: Tensor
    advantages_host: Sequence[float]
    prompts: Tensor
    prompts_host: Sequence[int]
    rows: Sequence[int]
    steps: Sequence[Sequence[int]]
    shared_step: int | None


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


@dataclass(frozen=True)
class Update:
    """What one optimiser step is made of on this process.

    Attributes:
        items: (row in the rollout, item) pairs.
        calls: of the model that they take.
        per_pair: weight of a (sample, step) pair in the mean over all processes' pairs.
    """

    items: Sequence[tuple[int, Item]]
    calls: int
    per_pair: float


def plan_update(
    policy: Policy, data: Experience, samples: Sequence[int], objective: Objective, total: int, tally: Tally
) -> Update:
    """The pairs of `samples` and their steps, one of `total` samples that all processes have in this update.

    Samples whose advantage is exactly 0 have no gradient and are not replayed, unless a KL pulls on them.
    """
    steps = len(data.steps[0]) if data.steps else 0
    active = [s for s in samples if data.advantages_host[s] != 0.0 or objective.kl_weight > 0]
    tally.counts["zero_advantage_skipped"] += (len(samples) - len(active)) * steps
    items: list[tuple[int, Item]] = []
    shared: dict[int, list[int]] = {}
    for turn in range(steps):
        for s in active:
            step = data.steps[s][turn]
            if step == data.shared_step:
                shared.setdefault(data.prompts_host[s], []).append(s)
            else:
                items.append((data.rows[s], Item((s,), step)))
    # A shared step sat in its prompt's row.
    for prompt, group in sorted(shared.items()):
        items.append((prompt % policy.rows, Item(tuple(group), data.shared_step or 0)))
    tally.counts["shared_rows_saved"] += sum(len(group) - 1 for group in shared.values())
    return Update(items, sum(1 for _ in pack(items, policy)), 1.0 / (total * max(steps, 1)))


def backward_update(
    policy: Policy,
    denoiser: nn.Module,
    table: TransitionTable,
    data: Experience,
    update: Update,
    objective: Objective,
    processes: Processes,
    calls: int,
    tally: Tally,
    first: bool,
    *,
    each_call: bool = False,
) -> bool:
    """Accumulates the gradient of the mean loss over an update's pairs; whether there was any on some process.

    Args:
        policy: the model as the rollout called it.
        denoiser: what is trained, as the processes wrap it.
        table: of the sampler.
        data: of this process.
        update: of this process.
        objective: the loss.
        processes: of the run. Gradients are averaged over them in the last call.
        calls: of the model, on every process. Those that `update` does not need have weight zero.
        tally: of this process.
        first: the update is the first after its rollout.
        each_call: reduce gradients in every call.
    """
    # Reductions average over processes, the loss is a sum over them.
    per_pair = update.per_pair * processes.count
    made = _losses(policy, denoiser, table, data, update.items, objective, tally, per_pair)
    changed = False
    for number in range(calls):
        with processes.reducing(denoiser, last=each_call or number == calls - 1):
            losses = next(made, None)
            if losses is None:
                processes.accelerator.backward(_nothing(policy, denoiser, table, data, objective, tally))
                changed = True
                continue
            for loss in losses:
                tally.add(loss.metrics, first)
            # Knowing that every sample was clipped costs nothing on the CPU; on a GPU it would be a host sync. Other
            # processes wait for this one's part of a reduction, zero or not.
            alone = not processes.distributed and losses[0].loss.device.type == "cpu"
            if alone and not any(bool(loss.has_grad.any()) for loss in losses):
                tally.counts["backwards_skipped"] += 1
                continue
            processes.accelerator.backward(torch.stack([loss.loss for loss in losses]).sum())
            changed = True
    return changed


def _nothing(
    policy: Policy,
    denoiser: nn.Module,
    table: TransitionTable,
    data: Experience,
    objective: Objective,
    tally: Tally,
) -> Tensor:
    """Zero, through the same model calls as a loss: for a process that has fewer of them than another."""
    tally.counts["model_rows"] += policy.rows
    tally.counts["padded_rows"] += policy.rows
    inputs = probe(policy, table, data.conditioning)
    output, uncond = policy(denoiser, *inputs)
    _reference(policy, denoiser, inputs, objective)
    return 0.0 * (output.sum() + (0.0 if uncond is None else uncond.sum()))


def _reference(
    policy: Policy, denoiser: nn.Module, inputs: tuple[Tensor, Tensor, Conditioning], objective: Objective
) -> Tensor | None:
    """The reference model's guided output, where a KL needs it."""
    if objective.kl_weight <= 0:
        return None
    frozen = denoiser if objective.reference is None else objective.reference
    with torch.no_grad(), objective.without_adapters():
        return guided_output(*policy(frozen, *inputs), policy.guidance_scale)


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
        inputs = (latents[index, step], times[step], select(data.conditioning, data.prompts[index]))
        outputs: list[Tensor | None] = [*policy(denoiser, *inputs), _reference(policy, denoiser, inputs, objective)]
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
