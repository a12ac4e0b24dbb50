"""Sampling: the model and `transition_step`, one trajectory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from ..models import Conditioning
from ..ops.transition import transition_step
from ..progress import counted
from ..transitions import TransitionTable
from .calls import Policy, chunks, select
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
        index = torch.arange(len(noise), device=noise.device)
        ends = []
        for part in chunks(len(noise), self.policy.rows):
            rows = made.rows(part.start, part.stop)
            call = self._caller(rows, index[part])
            for before in range(step):
                self._advance(before, rows, *call(before), index[part])
            ends.append(call(step))
        unconds = [uncond for _, uncond in ends if uncond is not None]
        return Start(step, made, torch.cat([output for output, _ in ends]), torch.cat(unconds) if unconds else None)

    @torch.no_grad()
    def samples(self, start: Start | Tensor, prompts: Tensor, ids: Tensor) -> Trajectory:
        """Draws the trajectories of B samples, in the dtype of the initial latents.

        Sample `i` sits in row `i % rows` of its model calls.

        Args:
            start: what the samples of a prompt share, or `[B, ...]` initial latents of each sample.
            prompts: int64 `[B]`, each sample's row of the conditioning and of a shared start.
            ids: int64 `[B]`, of the samples.
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
                self._expand(start, drawn.rows(part.start, part.stop), prompts[part], ids[part])
        for part, step in counted(list(product(parts, range(first, len(self.table)))), "sampling"):
            if step == first:
                rows = drawn.rows(part.start, part.stop)
                call = self._caller(rows, prompts[part])
            self._advance(step, rows, *call(step), ids[part])
        return drawn

    def _expand(self, start: Start, rows: Trajectory, prompts: Tensor, ids: Tensor) -> None:
        """The shared steps, and the first stochastic one, which call no model any more."""
        step, shared = start.step, start.shared
        rows.latents[:, : step + 1].copy_(shared.latents[prompts])
        rows.log_probs[:, :step].copy_(shared.log_probs[prompts])
        if rows.outputs is not None and shared.outputs is not None:
            rows.outputs[:, :step].copy_(shared.outputs[prompts])
        uncond = None if start.uncond is None else start.uncond[prompts]
        self._advance(step, rows, start.output[prompts], uncond, ids)

    def _caller(self, rows: Trajectory, prompts: Tensor) -> Callable[[int], tuple[Tensor, Tensor | None]]:
        """The model at the samples in `rows`, by step."""
        policy, conditioning = self.policy, select(self.conditioning, prompts)
        times = self.table.times.to(prompts.device, torch.float32)

        def call(step: int) -> tuple[Tensor, Tensor | None]:
            latents = rows.latents[:, step]
            return policy(
                policy.model.denoiser, latents, times[step].expand(len(latents)), conditioning, self._turns[step]
            )

        return call

    def _advance(self, step: int, rows: Trajectory, output: Tensor, uncond: Tensor | None, ids: Tensor) -> None:
        """One transition of the samples in `rows`, written into their buffer."""
        denoised = rows.denoised if step == len(self.table) - 1 else None
        out = transition_step(
            rows.latents[:, step],
            output,
            self.table,
            step,
            seed=self.seed,
            sample_ids=ids,
            uncond_output=uncond,
            guidance_scale=None if uncond is None else self.policy.scale(self._turns[step]),
            out=rows.latents[:, step + 1],
            return_denoised=denoised is not None,
        )
        rows.log_probs[:, step] = out.log_prob
        if denoised is not None and out.denoised is not None:
            denoised.copy_(out.denoised)
        if rows.outputs is not None:
            rows.outputs[:, step] = self.policy.guided(output, uncond, self._turns[step])
