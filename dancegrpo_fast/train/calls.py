"""A model call of fixed rows, as rollout and replay both make it, and the packing of what is replayed into calls."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import Conditioning, GeneratorModel
from ..ops.noise import gaussian_noise
from ..recipe import Recipe, SamplerSettings
from ..transitions import TransitionTable

# Of a model call: latents `[n, ...]`, times `[n]`, conditioning of n rows, and which denoiser it is for.
Inputs = tuple[Tensor, Tensor, Conditioning, int]


@dataclass(frozen=True)
class Policy:
    """The model as rollout and replay both call it.

    Every call has `rows` rows whatever is asked for; missing ones repeat the last and their outputs are dropped. The
    ratio is exactly 1 on policy because a row's arithmetic then never depends on how many rows there were to compute.

    Attributes:
        model: the family; its denoiser draws the rollout.
        rows: of every model call, the micro-batch.
        guidance_scale: 1 for none.
        unconditional: the empty prompt's conditioning under guidance.
        guidance_scale_2: of the second of two denoisers; None: the same.
    """

    model: GeneratorModel
    rows: int
    guidance_scale: float
    unconditional: Conditioning | None
    guidance_scale_2: float | None = None

    @classmethod
    def of(cls, recipe: Recipe, model: GeneratorModel, sampler: SamplerSettings | None = None) -> "Policy":
        """As a recipe has it; for a `model` of another sampler, that is given, too."""
        sampler = sampler or recipe.sampler
        unconditional = model.unconditional(sampler.guidance_scale)
        return cls(model, recipe.train.micro_batch, sampler.guidance_scale, unconditional, sampler.guidance_scale_2)

    def scale(self, expert: int) -> float:
        """Of guidance, for one of the model's denoisers."""
        return self.guidance_scale if expert == 0 or self.guidance_scale_2 is None else self.guidance_scale_2

    def __call__(
        self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditioning: Conditioning, expert: int
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs `[n, ...]` for `n <= rows` samples: the conditional one, and the unconditional one under guidance.

        `expert` is that of `GeneratorModel.turns` for all of the times.
        """
        count, compiled = latents.shape[0], self.model.compiled
        predict = self.model.predict if compiled is None else partial(compiled, self.model.predict)
        output, uncond = predict(
            denoiser,
            pad_rows(latents, self.rows),
            pad_rows(times, self.rows),
            {name: pad_rows(value, self.rows) for name, value in conditioning.items()},
            self.unconditional,
            self.scale(expert),
            expert,
        )
        return output[:count], None if uncond is None else uncond[:count]

    def guided(self, output: Tensor, uncond: Tensor | None, expert: int) -> Tensor:
        """Classifier-free guidance in float32, as the kernels combine it."""
        if uncond is None:
            return output.float()
        return uncond.float() + self.scale(expert) * (output.float() - uncond.float())


def pad_rows(values: Tensor, rows: int) -> Tensor:
    """Repeats the last row up to `rows`."""
    missing = rows - values.shape[0]
    return values if missing == 0 else torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])


def chunks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def select(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """Rows of every conditioning tensor."""
    return {name: value[rows] for name, value in conditioning.items()}


def probe(policy: Policy, table: TransitionTable, conditioning: Conditioning, expert: int | None = None) -> Inputs:
    """Inputs of one model call that belong to no sample, for a denoiser (None: that of the first step)."""
    turns = policy.model.turns(table)
    expert = turns[0] if expert is None else expert
    embeds = next(iter(conditioning.values()))
    index = torch.arange(policy.rows, device=embeds.device)
    latents = gaussian_noise(policy.model.latent_shape, seed=0, sample_ids=index)
    own = torch.tensor([turn == expert for turn in turns])
    times = table.times[own].to(embeds.device, torch.float32)
    return latents, times[index % len(times)], select(conditioning, index % len(embeds)), expert


def compile_calls(policy: Policy, table: TransitionTable, conditioning: Conditioning) -> bool:
    """Compiles rollout's and replay's calls, and the backward; whether both forwards have the same bits."""
    equal = True
    for expert in sorted(set(policy.model.turns(table))):
        inputs = probe(policy, table, conditioning, expert)
        with torch.no_grad():
            drawn = policy(policy.model.denoiser, *inputs)
        with torch.enable_grad():
            replayed = policy(policy.model.denoiser, *inputs)
        for before, after in zip(drawn, replayed, strict=True):
            equal &= before is None or after is None or torch.equal(before, after)
        total = torch.stack([output.sum() for output in replayed if output is not None]).sum()
        if total.requires_grad:
            own = [parameter for parameter in policy.model.denoiser.parameters() if parameter.requires_grad]
            torch.autograd.grad(total, own, allow_unused=True)
    return equal


@torch.no_grad()
def rows_are_equal(policy: Policy, table: TransitionTable, conditioning: Conditioning) -> bool:
    """Whether the model's bits do not depend on the row of the micro-batch, tried for every row and every shift.

    Matrix products may treat the last rows of a batch differently; where they do, a sample has to be replayed in the
    row it was sampled in.
    """
    for expert in sorted(set(policy.model.turns(table))):
        latents, times, embeds, _ = probe(policy, table, conditioning, expert)
        outputs = policy(policy.model.denoiser, latents, times, embeds, expert)
        for shift in range(1, policy.rows):
            order = torch.arange(policy.rows, device=latents.device).roll(shift)
            moved = policy(policy.model.denoiser, latents[order], times[order], select(embeds, order), expert)
            for before, after in zip(outputs, moved, strict=True):
                if before is not None and after is not None and not torch.equal(before[order], after):
                    return False
    return True


def model_calls(rows: int, steps: int, prompts: int, samples: int, *, shared: int = 0) -> int:
    """How many calls of `rows` rows sampling takes; the first `shared` steps are made once a prompt."""
    return shared * -(-prompts // rows) + (steps - shared) * -(-samples // rows)


@torch.no_grad()
def fill_calls(
    policy: Policy, table: TransitionTable, conditioning: Conditioning, calls: Sequence[int], index: int
) -> None:
    """Calls the model for nothing, on a process `index` that has fewer calls than one which gathers parameters with it.

    `calls` are those of every process.
    """
    inputs = probe(policy, table, conditioning)
    for _ in range(calls[index], max(calls)):
        policy(policy.model.denoiser, *inputs)


class Item(NamedTuple):
    """What is replayed in one row of a model call.

    Attributes:
        samples: that share the row's input; each is a pair with `step`.
        step: which of its sample's inputs it is.
        row: of the call, where the model's bits depend on it.
        expert: of the model's denoisers, which takes the step; a call is for one.
    """

    samples: tuple[int, ...]
    step: int
    row: int
    expert: int = 0


class Call(NamedTuple):
    """One model call of the replay; tensors are int64 on the device.

    Attributes:
        used: rows that have an item; the others compute one of them again.
        rows: `[3, rows]`: sample, step and prompt of every row.
        single: the rows that stand for one sample.
        shared: a row, its step and its samples, for rows that stand for several.
        weight: of a pair in the loss.
        expert: of the model's denoisers.
    """

    used: int
    rows: Tensor
    single: Tensor
    shared: list[tuple[int, int, Tensor]]
    weight: float
    expert: int


def plan_calls(
    packed: Iterable[Mapping[int, Item]], rows: int, prompts: Sequence[int], weight: float, device: torch.device
) -> list[Call]:
    """Calls that compute what `pack` dealt out, their indices brought to the device in one copy.

    Args:
        packed: for each call, what sits in which of its rows.
        rows: of a call.
        prompts: of every sample.
        weight: of a pair.
        device: of the indices.
    """
    numbers: list[int] = []

    def keep(values: Iterable[int]) -> slice:
        start = len(numbers)
        numbers.extend(values)
        return slice(start, len(numbers))

    plan = []
    for places in packed:
        # An empty row computes another one's item again.
        spare = next(iter(places.values()))
        items = [places.get(row, spare) for row in range(rows)]
        every = [(item.samples[0], item.step, prompts[item.samples[0]]) for item in items]
        index = keep(chain(*zip(*every, strict=True)))
        single = keep(row for row, item in places.items() if len(item.samples) == 1)
        several = ((row, item) for row, item in places.items() if len(item.samples) > 1)
        shared = [(row, item.step, keep(item.samples)) for row, item in several]
        plan.append((len(places), index, single, shared, spare.expert))
    there = torch.tensor(numbers, dtype=torch.int64).to(device)
    return [
        Call(
            used, there[index].view(3, rows), there[single], [(r, t, there[part]) for r, t, part in shared], weight, one
        )
        for used, index, single, shared, one in plan
    ]


def pack(items: Sequence[Item], rows: int, *, equal: bool) -> Iterator[dict[int, Item]]:
    """Deals items out to model calls, denoiser by denoiser: for each call, what sits in which of its rows.

    Args:
        items: neighbours stay neighbours.
        rows: of a call.
        equal: the model's bits do not depend on the row: calls are filled without gaps. Else every item sits in its
            row, and some rows stay empty.
    """
    for expert in sorted({item.expert for item in items}):
        own = [item for item in items if item.expert == expert]
        if equal:
            for part in chunks(len(own), rows):
                yield dict(enumerate(own[part]))
            continue
        queues: dict[int, list[Item]] = {}
        for item in own:
            queues.setdefault(item.row, []).append(item)
        for turn in range(max(map(len, queues.values()))):
            yield {row: queue[turn] for row, queue in sorted(queues.items()) if turn < len(queue)}
