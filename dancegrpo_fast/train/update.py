"""The updates of an iteration: who is in which, the model calls it takes, and their gradients."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..experts import trained
from ..processes import Processes
from ..recipe import Recipe
from ..rng import generator
from ..transitions import TransitionTable
from .calls import Call, Inputs, Policy, pack, plan_calls, probe, select
from .collect import Batch
from .losses import Loss, Outputs, Term
from .metrics import Tally
from .one_pass import OnePass


@dataclass
class Updates:
    """What one optimiser step after the other is made of, by the same model calls as in the rollout.

    Attributes:
        denoiser: what is trained, as the processes wrap it.
        rows_are_equal: the model gives the same bits in whichever row of a call a sample sits.
        each_call: processes reduce gradients after every model call, not once an update.
        one_pass: has the gradients of the calls that drew the samples, and what is replayed is the rest of them; the
            denoiser is not wrapped then.
    """

    recipe: Recipe
    policy: Policy
    denoiser: nn.Module
    table: TransitionTable
    loss: Loss
    processes: Processes
    rows_are_equal: bool
    each_call: bool
    one_pass: OnePass | None = None

    def plan(self, batch: Batch, iteration: int, tally: Tally) -> list[tuple[list[Call], int]]:
        """For each update this process's model calls, and how many every process makes in it."""
        place = {sample: here for here, sample in enumerate(batch.kept)}
        updates = []
        for epoch in range(self.recipe.train.inner_epochs):
            for samples in self._deal(batch.chosen, iteration, epoch):
                ours = [place[sample] for sample in samples if sample in place]
                updates.append(self._calls(batch, ours, len(samples), tally))
        # Where calls gather parameters or reduce gradients, every process makes as many as the one that needs most;
        # where only the last one reduces, at least that one.
        own = torch.tensor([len(calls) for calls in updates])
        most = self.processes.max(own).cpu()
        every = self.each_call or self.processes.sharded
        made = most if every else torch.maximum(own, most.clamp(max=1))
        made = own if self.one_pass else made
        rows, used = int(made.sum()) * self.policy.rows, sum(call.used for calls in updates for call in calls)
        tally.counts["model_rows"] += rows
        tally.counts["padded_rows"] += rows - used
        return list(zip(updates, made.tolist(), strict=True))

    def _deal(self, chosen: Sequence[int], iteration: int, epoch: int) -> list[list[int]]:
        """The samples of every update of an epoch; how many processes there are does not matter."""
        updates, rows = self.recipe.train.updates_per_rollout, self.policy.rows
        random = generator(self.recipe.seed, "updates", iteration, epoch)
        if not self.rows_are_equal:
            # An even share of each row of the micro-batch, so that no row waits for another.
            order = torch.randperm(len(chosen), generator=random).tolist()
            dealt = sorted((chosen[i] for i in order), key=lambda sample: sample % rows)
            return [sorted(dealt[update::updates]) for update in range(updates)]
        # One of each run of neighbours, so that no process waits for another, whichever neighbours it has.
        hands: list[list[int]] = [[] for _ in range(updates)]
        for first in range(0, len(chosen), updates):
            order = torch.randperm(updates, generator=random).tolist()
            for sample, update in zip(chosen[first : first + updates], order, strict=False):
                hands[update].append(sample)
        return hands

    def _calls(self, batch: Batch, samples: Sequence[int], total: int, tally: Tally) -> list[Call]:
        """Model calls for `samples`, of `total` that all processes have in this update."""
        items, each = self.loss.pairs(batch, samples), self.loss.pairs_per_sample
        pairs = sum(len(item.samples) for item in items)
        tally.counts["zero_advantage_skipped"] += len(samples) * each - pairs
        tally.counts["shared_rows_saved"] += pairs - len(items)
        if self.one_pass is not None:
            items = [item for item in items if item.step == batch.shared_step]
        packed = pack(items, self.policy.rows, equal=self.rows_are_equal)
        weight = self._weight(total)
        return plan_calls(packed, self.policy.rows, batch.prompts, weight, batch.own_advantages.device)

    def _weight(self, total: int) -> float:
        """Of a pair, of so many samples that all processes have in an update."""
        # Reductions average over processes, the loss is a sum over them.
        return 1.0 / (max(total, 1) * self.loss.pairs_per_sample) * self.processes.count

    def backward(
        self, batch: Batch, calls: Sequence[Call], made: int, tally: Tally, *, first: bool, scale: float
    ) -> bool:
        """Accumulates the gradient of an update's mean loss; whether there was any on some process.

        Args:
            batch: of this process.
            calls: of this process.
            made: how many it makes; those that are missing in `calls` have weight zero. Gradients are averaged over
                processes in the last one, or in each.
            tally: of this process.
            first: the update is the first after its rollout.
            scale: of the loss.
        """
        changed = False
        for number in range(made):
            with self._reducing(last=self.each_call or number == made - 1):
                loss = self._nothing(batch) if number >= len(calls) else self._sum(batch, calls[number], tally, first)
                if loss is None:
                    tally.counts["backwards_skipped"] += 1
                    continue
                self.processes.accelerator.backward(loss if scale == 1 else scale * loss)
                changed = True
        if self.one_pass is not None:
            samples = [here for here, sample in enumerate(batch.kept) if sample in set(batch.chosen)]
            items = self.loss.pairs(batch, samples)
            pairs = {(one, item.step) for item in items if item.step != batch.shared_step for one in item.samples}
            changed |= self.one_pass.backward(batch, pairs, self._weight(len(batch.chosen)), tally)
        if changed:
            self._add_missing()
        return self.one_pass.reduce(self.processes) or changed if self.one_pass else changed

    def _reducing(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.one_pass else self.processes.reducing(self.denoiser, last)

    def _add_missing(self) -> None:
        """Gradients of zero for a denoiser that had no call, so that its momentum moves on as the other's does."""
        for one in trained(self.policy.model.denoiser):
            own = [parameter for parameter in one.parameters() if parameter.requires_grad]
            if all(parameter.grad is None for parameter in own):
                for parameter in own:
                    parameter.grad = torch.zeros_like(parameter)

    def _sum(self, batch: Batch, call: Call, tally: Tally, first: bool) -> Tensor | None:
        """Of a call's terms; None where it is known to have no gradient."""
        terms = self.terms(batch, call)
        for term in terms:
            tally.add(term, first)
        # Knowing that every sample was clipped costs nothing on the CPU; on a GPU it would be a host sync. Other
        # processes wait for this one's part of a reduction, zero or not.
        alone = not self.processes.distributed and terms[0].loss.device.type == "cpu"
        if alone and not any(bool(term.has_grad.any()) for term in terms):
            return None
        return torch.stack([term.loss for term in terms]).sum()

    def _nothing(self, batch: Batch) -> Tensor:
        """Zero, through the same model calls as a loss: for a process that has fewer of them than another."""
        outputs = self._outputs(probe(self.policy, self.table, batch.conditioning))
        made = [outputs[name] for name in ("model_output", "uncond_output")]
        return 0.0 * torch.stack([values.sum() for values in made if values is not None]).sum()

    def _outputs(self, inputs: Inputs) -> Outputs:
        output, uncond = self.policy(self.denoiser, *inputs)
        others = self.loss.others(self.policy, self.denoiser, inputs)
        return {"model_output": output, "uncond_output": uncond, **others}

    def terms(self, batch: Batch, call: Call) -> list[Term]:
        """The losses of a model call: of the rows that stand for one sample, and of each that stands for several."""
        samples, steps, prompts = call.rows
        inputs = self.loss.inputs(batch, samples, steps)
        scale = self.policy.scale(call.expert)
        outputs = self._outputs((*inputs, select(batch.conditioning, prompts), call.expert))

        def term(samples: Tensor, steps: Tensor, outputs: Outputs) -> Term:
            return self.loss.term(batch, samples, steps, outputs, len(samples) * call.weight, scale)

        if len(call.single) == self.policy.rows:
            return [term(samples, steps, outputs)]
        terms = []
        if len(call.single) > 0:
            rows = {name: None if values is None else values[call.single] for name, values in outputs.items()}
            terms.append(term(samples[call.single], steps[call.single], rows))
        for row, step, group in call.shared:
            shape = len(group), *batch.trajectory.latents.shape[2:]
            expanded = {name: None if values is None else values[row].expand(shape) for name, values in outputs.items()}
            terms.append(term(group, torch.full_like(group, step), expanded))
        return terms
