"""One pass: gradients of the very model calls that draw the samples, weighted when the advantages are known.

With one update a rollout the ratio is 1 where its gradient is taken, which is then -advantage times that of the
log-probability: a second forward would only make the first one's outputs again.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..processes import Processes
from .calls import Inputs, Policy, chunks
from .collect import Batch
from .draw import Dealt
from .losses import Loss, Outputs
from .metrics import Tally
from .per_sample import PerSample
from .trajectory import Trajectory


class Unweighted(NamedTuple):
    """What a loss sees of samples before their rewards are known: advantages of 1."""

    trajectory: Trajectory
    own_advantages: Tensor


class Record(NamedTuple):
    """The pairs of one model call of the rollout.

    Attributes:
        places: of their samples in the batch of all processes.
        step: of all of them.
        expert: that took it.
        outputs: the models', `[n, ...]`; with their graph where that is kept.
    """

    places: Sequence[int]
    step: int
    expert: int
    outputs: Outputs


class OnePass:
    """A `Recorder` that keeps the graphs of calls, or runs their backward at once.

    Steps whose model call is made once a prompt are not dealt here: their samples' gradients meet in one row. They are
    replayed, which takes a row a prompt.

    Args:
        policy: the model.
        loss: of the run.
        steps: of the sampler.
        rows_are_equal: as in `Updates`.
        parameters: that are trained, by name.
        per_sample: sums gradients of every sample; None keeps graphs.
    """

    def __init__(
        self,
        policy: Policy,
        loss: Loss,
        steps: int,
        rows_are_equal: bool,
        parameters: Mapping[str, nn.Parameter],
        per_sample: PerSample | None,
    ) -> None:
        self._policy, self._loss, self._steps, self._equal = policy, loss, steps, rows_are_equal
        self._parameters, self._per_sample = parameters, per_sample
        self._part, self._dealt = range(0), list[list[Dealt]]()
        self._records: list[Record] = []
        # Of samples at these places, the sums of their gradients by parameter.
        self._sums: list[tuple[Sequence[int], dict[str, Tensor]]] = []

    def restart(self) -> None:
        """Forgets an iteration's calls, of one that was left, too."""
        self._records, self._sums = [], []

    def begin(self, part: range, first: int, device: torch.device) -> None:
        """Deals the steps of samples at the places `part`, of which that at 0 has number `first` in the run."""
        self._part = part
        own = [set(self._loss.steps(first + place)) for place in part]
        plan = [list(self._calls(step, own)) for step in range(self._steps)]
        there = iter(_on_device((indices for calls in plan for call in calls for indices in call), device))
        self._dealt = [
            [Dealt(next(there), next(there), [part[samples[row]] for row in rows]) for samples, rows in calls]
            for calls in plan
        ]
        if self._per_sample is not None:
            self._per_sample.start(len(part))

    def _calls(self, step: int, own: Sequence[Collection[int]]) -> Iterator[tuple[list[int], list[int]]]:
        """The samples of each call, and its rows that are trained on, which come together in as few as can be."""
        rows, order = self._policy.rows, sorted(range(len(own)), key=lambda sample: step not in own[sample])
        if self._equal:
            calls = [order[part] for part in chunks(len(order), rows)]
        else:
            queues = [[sample for sample in order if sample % rows == row] for row in range(rows)]
            calls = [[queue[turn] for queue in queues if turn < len(queue)] for turn in range(len(queues[0]))]
        for call in calls:
            yield call, [row for row, sample in enumerate(call) if step in own[sample]]

    def deal(self, step: int) -> Sequence[Dealt]:
        """The model calls of a step."""
        return self._dealt[step]

    @contextmanager
    def call(self, dealt: Dealt) -> Iterator[None]:
        """Around a model call that is trained on, and its `take`."""
        with torch.enable_grad(), nullcontext() if self._per_sample is None else self._per_sample.of(dealt.samples):
            yield

    def take(self, drawn: Trajectory, step: int, dealt: Dealt, inputs: Inputs, outputs: Outputs) -> None:
        """Records a call.

        Args:
            drawn: the part's samples, with what the step drew.
            step: of all rows.
            dealt: the call.
            inputs: of the model.
            outputs: of it, with their graph.
        """
        whole = {**outputs, **self._loss.others(self._policy, self._policy.model.denoiser, inputs)}
        kept = _rows(whole, dealt.trained, len(dealt.samples))
        if self._per_sample is not None:
            samples = dealt.samples[dealt.trained]
            unweighted = Unweighted(drawn, torch.ones(len(self._part), device=samples.device))
            weight, steps = len(samples) / self._loss.pairs_per_sample, torch.full_like(samples, step)
            self._loss.term(unweighted, samples, steps, kept, weight, self._policy.scale(inputs[-1])).loss.backward()
            kept = {name: None if values is None else values.detach() for name, values in kept.items()}
        self._records.append(Record(dealt.places, step, inputs[-1], kept))

    def keep(self, places: Collection[int]) -> None:
        """Of the samples that were begun last, no others than those at `places` will be trained on."""
        part, kept = self._part, set(places)
        self._records = [one for one in self._records if one.places[0] not in part or kept.intersection(one.places)]
        if self._per_sample is not None:
            own = [place for place in part if place in kept]
            sums = self._per_sample.take()
            if len(own) < len(part):
                device = next(iter(sums.values())).device
                (index,) = _on_device([[place - part.start for place in own]], device)
                sums = {name: values[index] for name, values in sums.items()}
            self._sums.append((own, sums))

    def backward(self, batch: Batch, pairs: Collection[tuple[int, int]], weight: float, tally: Tally) -> bool:
        """Adds the gradient of these pairs' loss to the parameters'; whether there was any.

        Args:
            batch: of this process.
            pairs: of its samples and steps.
            weight: of a pair.
            tally: of this process.
        """
        here, records, any_found = {place: sample for sample, place in enumerate(batch.kept)}, self._records, False
        chosen = [
            [row for row, place in enumerate(one.places) if (here.get(place), one.step) in pairs] for one in records
        ]
        samples = [[here[one.places[row]] for row in rows] for one, rows in zip(records, chosen, strict=True)]
        there = iter(_on_device(chain(chosen, samples), batch.own_advantages.device))
        rows = [next(there) for _ in records]
        # A graph is let go of when it was gone through.
        self._records = []
        records.reverse()
        for row in rows:
            one, index = records.pop(), next(there)
            if len(index) == 0:
                continue
            tally.counts["one_pass_rows"] += len(index)
            any_found = True
            outputs = _rows(one.outputs, row, len(one.places))
            steps, scale = torch.full_like(index, one.step), self._policy.scale(one.expert)
            term = self._loss.term(batch, index, steps, outputs, len(index) * weight, scale)
            tally.add(term, first=True)
            if self._per_sample is None:
                term.loss.backward()
        if self._per_sample is not None:
            self._weight(batch, {batch.kept[sample] for sample, _ in pairs}, here, weight)
        return any_found

    def _weight(self, batch: Batch, active: Collection[int], here: Mapping[int, int], weight: float) -> None:
        """Adds the samples' gradients, each times its advantage, of those at the places `active`."""
        sums, self._sums = self._sums, []
        for places, by_name in sums:
            rows = [row for row, place in enumerate(places) if place in active]
            if not rows:
                continue
            row, sample = _on_device([rows, [here[places[one]] for one in rows]], batch.own_advantages.device)
            factors = batch.own_advantages[sample] * (weight * self._loss.pairs_per_sample)
            for name, values in by_name.items():
                used, parameter = values if len(rows) == len(places) else values[row], self._parameters[name]
                added = torch.tensordot(factors, used, dims=1).to(parameter.dtype)
                parameter.grad = added if parameter.grad is None else parameter.grad + added

    def reduce(self, processes: Processes) -> bool:
        """Averages gradients over the processes, zero where one has none; whether processes are distributed."""
        if not processes.distributed:
            return False
        for parameter in self._parameters.values():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = processes.sum(own) / processes.count
        return True


def _rows(outputs: Outputs, rows: Tensor, count: int) -> Outputs:
    """Some of `count` rows of every output; no copy of all."""
    if len(rows) == count:
        return outputs
    return {name: None if values is None else values[rows] for name, values in outputs.items()}


def _on_device(lists: Iterable[Sequence[int]], device: torch.device) -> list[Tensor]:
    """int64 tensors of these numbers, brought there in one copy."""
    lists = list(lists)
    there = torch.tensor(list(chain(*lists)), dtype=torch.int64).to(device)
    return list(there.split([len(one) for one in lists]))
