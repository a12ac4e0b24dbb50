"""Sampling: the model and `transition_step`, one trajectory."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..models import Conditioning
from ..ops.transition import transition_step
from ..progress import counted
from ..transitions import TransitionTable
from .calls import Inputs, Policy, chunks, select
from .trajectory import Trajectory


@dataclass(frozen=True)
class Start:
    """What the samples of each of P prompts have in common when they start from one noise.

    The steps before the first stochastic one follow the ODE, and that one's model call still has one input a prompt.

    Attributes:
        step: k, the first stochastic one.
        shared: steps 0 to k - 1, one sample a prompt.
        output, uncond: the model's at step k, `[P, ...]`.
    """

    step: int
    shared: Trajectory
    output: Tensor
    uncond: Tensor | None


class Dealt(NamedTuple):
    """A model call that is dealt out.

    Attributes:
        samples: int64 `[n]`, which of those that are drawn sit in its rows.
        trained: int64 `[m]`, rows whose transition is trained on.
        places: `[m]`, what these samples are called.
    """

    samples: Tensor
    trained: Tensor
    places: Sequence[int]


class Recorder(Protocol):
    """Deals the model calls of a rollout, and takes their gradients."""

    def deal(self, step: int) -> Sequence[Dealt]:
        """The calls of a step, in which every sample is once."""
        ...

    def call(self, dealt: Dealt) -> AbstractContextManager[None]:
        """Around a call of which rows are trained on, and its `take`."""
        ...

    def take(
        self, drawn: Trajectory, step: int, dealt: Dealt, inputs: Inputs, outputs: dict[str, Tensor | None]
    ) -> None:
        """What the call made, once it was drawn from; outputs have their graph."""
        ...


def shared_step(table: TransitionTable) -> int:
    """The first stochastic step; samples that start equal have equal inputs up to it.

    Raises:
        ValueError: the table has none.
    """
    stochastic = table.tau.gt(0).nonzero()
    if len(stochastic) == 0:
        raise ValueError("table: got no stochastic step, want one where samples that start equal part")
    return int(stochastic[0])


@dataclass(frozen=True)
class Draw:
    """Draws samples of P prompts.

    Attributes:
        policy: the model.
        table: the sampler, T steps.
        conditioning: one row per prompt.
        seed: of the step noise, keyed by the samples' ids.
        keep_outputs: trajectories keep the (guided) model outputs.
    """

    policy: Policy
    table: TransitionTable
    conditioning: Conditioning
    seed: int
    keep_outputs: bool = False

    @cached_property
    def _turns(self) -> Sequence[int]:
        return self.policy.model.turns(self.table)

    @torch.no_grad()
    def start(self, noise: Tensor, step: int) -> Start:
        """Computes once what samples that start from `noise` `[P, ...]`, one row a prompt, share up to `step`."""
        made = Trajectory.allocate(len(noise), step, noise, keep_outputs=self.keep_outputs)
        made.latents[:, 0].copy_(noise)
        index, denoiser = torch.arange(len(noise), device=noise.device), self.policy.model.denoiser
        ends = []
        for part in chunks(len(noise), self.policy.rows):
            inputs = self._inputs(made, part, index[part])
            for before in range(step):
                self._advance(before, made, part, *self.policy(denoiser, *inputs(before)), index[part])
            ends.append(self.policy(denoiser, *inputs(step)))
        unconds = [uncond for _, uncond in ends if uncond is not None]
        return Start(step, made, torch.cat([output for output, _ in ends]), torch.cat(unconds) if unconds else None)

    @torch.no_grad()
    def samples(
        self, start: Start | Tensor, prompts: Tensor, ids: Tensor, recorder: Recorder | None = None
    ) -> Trajectory:
        """Draws the trajectories of B samples, in the dtype of the initial latents.

        Sample `i` sits in row `i % rows` of its model calls, or where a recorder deals it.

        Args:
            start: what the samples of a prompt share, or `[B, ...]` initial latents of each sample.
            prompts: int64 `[B]`, each sample's row of the conditioning and of a shared start.
            ids: int64 `[B]`, of the samples.
            recorder: takes gradients of the calls behind a shared start; None: there are none.
        """
        initial = start if isinstance(start, Tensor) else start.shared.latents[:, 0]
        drawn = Trajectory.allocate(
            len(ids),
            len(self.table),
            initial,
            keep_denoised=self.policy.model.decodes_x0,
            keep_outputs=self.keep_outputs,
        )
        parts, first = list(chunks(len(ids), self.policy.rows)), 0
        if isinstance(start, Tensor):
            drawn.latents[:, 0].copy_(start)
        else:
            first = start.step + 1
            for part in parts:
                self._expand(start, drawn, part, prompts[part], ids[part])
        if recorder is not None:
            for step in counted(range(first, len(self.table)), "sampling"):
                for dealt in recorder.deal(step):
                    self._recorded(step, drawn, prompts, ids, recorder, dealt)
            return drawn
        for part, step in counted(list(product(parts, range(first, len(self.table)))), "sampling"):
            if step == first:
                inputs = self._inputs(drawn, part, prompts[part])
            output, uncond = self.policy(self.policy.model.denoiser, *inputs(step))
            self._advance(step, drawn, part, output, uncond, ids[part])
        return drawn

    def _recorded(
        self, step: int, drawn: Trajectory, prompts: Tensor, ids: Tensor, recorder: Recorder, dealt: Dealt
    ) -> None:
        """A model call as it was dealt, and its transitions."""
        samples, denoiser = dealt.samples, self.policy.model.denoiser
        inputs = self._inputs(drawn, samples, prompts[samples])(step)
        if not dealt.places:
            self._advance(step, drawn, samples, *self.policy(denoiser, *inputs), ids[samples])
            return
        with recorder.call(dealt):
            output, uncond = self.policy(denoiser, *inputs)
            without = None if uncond is None else uncond.detach()
            self._advance(step, drawn, samples, output.detach(), without, ids[samples])
            recorder.take(drawn, step, dealt, inputs, {"model_output": output, "uncond_output": uncond})

    def _expand(self, start: Start, drawn: Trajectory, part: slice, prompts: Tensor, ids: Tensor) -> None:
        """The shared steps, and the first stochastic one, which call no model any more."""
        step, shared, rows = start.step, start.shared, drawn.rows(part.start, part.stop)
        rows.latents[:, : step + 1].copy_(shared.latents[prompts])
        rows.log_probs[:, :step].copy_(shared.log_probs[prompts])
        if rows.outputs is not None and shared.outputs is not None:
            rows.outputs[:, :step].copy_(shared.outputs[prompts])
        uncond = None if start.uncond is None else start.uncond[prompts]
        self._advance(step, drawn, part, start.output[prompts], uncond, ids)

    def _inputs(self, drawn: Trajectory, samples: slice | Tensor, prompts: Tensor) -> Callable[[int], Inputs]:
        """The model's at some samples, by step."""
        conditioning = select(self.conditioning, prompts)
        times = self.table.times.to(prompts.device, torch.float32)

        def inputs(step: int) -> Inputs:
            latents = drawn.latents[samples, step]
            return latents, times[step].expand(len(latents)), conditioning, self._turns[step]

        return inputs

    @torch.no_grad()
    def _advance(
        self, step: int, drawn: Trajectory, samples: slice | Tensor, output: Tensor, uncond: Tensor | None, ids: Tensor
    ) -> None:
        """One transition of some samples, written into the buffer."""
        denoised = drawn.denoised if step == len(self.table) - 1 else None
        # What an index picks is a copy.
        there = drawn.latents[samples, step + 1] if isinstance(samples, slice) else None
        out = transition_step(
            drawn.latents[samples, step],
            output,
            self.table,
            step,
            seed=self.seed,
            sample_ids=ids,
            uncond_output=uncond,
            guidance_scale=None if uncond is None else self.policy.scale(self._turns[step]),
            out=there,
            return_denoised=denoised is not None,
        )
        if there is None:
            drawn.latents[samples, step + 1] = out.latents
        drawn.log_probs[samples, step] = out.log_prob
        if denoised is not None and out.denoised is not None:
            denoised[samples] = out.denoised
        if drawn.outputs is not None:
            drawn.outputs[samples, step] = self.policy.guided(output, uncond, self._turns[step])
