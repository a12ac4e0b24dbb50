"""GRPO: the clipped policy loss on steps of the trajectories, and a KL to the model as loaded."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops.policy_loss import PolicyMetrics, policy_loss
from ...recipe import Recipe, SamplerSettings
from ...rng import generator
from ...transitions import TransitionTable
from ..calls import Inputs, Item, Policy
from ..collect import Batch
from ..reference import Reference
from .base import Outputs, Sampled, Term


class Grpo:
    """A `Loss`.

    Args:
        recipe: its `train` has the settings.
        table: of the sampler.
        turns: which of the model's denoisers takes each step.
        experts: how many of these are trained, the first ones.
        reference: the model as loaded, for the KL; None: no KL.
        device: of the run.

    Attributes:
        trainable_steps: the stochastic steps before the last, of denoisers that are trained.
        pairs_per_sample: how many of them a sample is trained on.

    Raises:
        ValueError: there is none, or none of one of two denoisers.
    """

    def __init__(
        self,
        recipe: Recipe,
        table: TransitionTable,
        turns: Sequence[int],
        experts: int,
        reference: Reference | None,
        device: torch.device,
    ) -> None:
        self._train, self._seed = recipe.train, recipe.seed
        self._table, self._times = table, table.times.to(device, torch.float32)
        self._turns, self._reference = turns, reference
        self.keeps_outputs = recipe.train.ratio_norm
        hidden = {"samples", "ratio_max_dev", "advantage_clip_fraction"}
        hidden |= {"reference_kl"} if reference is None else set()
        self.metrics: Sequence[str] = [name for name in PolicyMetrics._fields if name not in hidden]
        noisy = [t for t in range(len(table) - 1) if table.tau[t] > 0]
        self.trainable_steps = [t for t in noisy if turns[t] < experts]
        for expert in range(experts if noisy else 0):
            if all(turns[t] != expert for t in noisy):
                raise ValueError(_without_steps(recipe, table, turns, expert))
        self.pairs_per_sample = steps_per_sample(recipe, len(self.trainable_steps))

    def steps(self, number: int) -> list[int]:
        """The steps that the sample with this number in the run is trained on, in an order drawn for it."""
        order = torch.randperm(len(self.trainable_steps), generator=generator(self._seed, "timesteps", number))
        return [self.trainable_steps[i] for i in order[: self.pairs_per_sample].tolist()]

    def pairs(self, batch: Batch, samples: Sequence[int]) -> list[Item]:
        """Every sample with its steps, and as one item the samples of a prompt that share a step's model call.

        Samples whose advantage is exactly 0 have no gradient and are left out, unless a KL pulls on them.
        """
        advantages = batch.advantages.tolist()
        active = [s for s in samples if self._reference is not None or advantages[batch.kept[s]] != 0.0]
        steps = {s: self.steps(batch.first + batch.kept[s]) for s in active}
        items: list[Item] = []
        shared: dict[int, list[int]] = {}
        for turn in range(self.pairs_per_sample):
            for s in active:
                if steps[s][turn] == batch.shared_step:
                    shared.setdefault(batch.prompts[s], []).append(s)
                else:
                    step = steps[s][turn]
                    items.append(Item((s,), step, batch.rows[s], self._turns[step]))
        # A shared step sat in its prompt's row.
        rows, step = self._train.micro_batch, batch.shared_step or 0
        return items + [
            Item(tuple(group), step, prompt % rows, self._turns[step]) for prompt, group in sorted(shared.items())
        ]

    def inputs(self, batch: Batch, samples: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the rollout."""
        return batch.trajectory.latents[samples, steps], self._times[steps]

    def others(self, policy: Policy, denoiser: nn.Module, inputs: Inputs) -> Outputs:
        """The reference's guided output."""
        return {} if self._reference is None else {"reference_output": self._reference(policy, denoiser, inputs)}

    def term(
        self, batch: Sampled, samples: Tensor, steps: Tensor, outputs: Outputs, weight: float, guidance_scale: float
    ) -> Term:
        """`policy_loss`."""
        train, drawn = self._train, batch.trajectory
        model_output, old = outputs["model_output"], drawn.log_probs[samples, steps]
        assert model_output is not None
        found = policy_loss(
            drawn.latents[samples, steps],
            model_output,
            drawn.latents[samples, steps + 1],
            self._table,
            steps,
            old,
            batch.own_advantages[samples],
            clip_range=train.ratio_clip(),
            # Each reward's were limited before they were added.
            advantage_clip=math.inf,
            uncond_output=outputs["uncond_output"],
            guidance_scale=None if outputs["uncond_output"] is None else guidance_scale,
            reference_output=outputs.get("reference_output"),
            kl_weight=train.kl_weight,
            ratio_norm=train.ratio_norm,
            old_output=None if drawn.outputs is None else drawn.outputs[samples, steps],
            weight=weight,
        )
        metrics = found.metrics
        moved = steps, (found.log_prob - old).abs()
        return Term(found.loss, metrics.samples, metrics._asdict(), metrics.ratio_max_dev, found.has_grad, moved)


def check_steps(recipe: Recipe) -> None:
    """`steps_per_sample` of the settings alone, before there is a table.

    Raises:
        ValueError: they leave no step to train on.
    """
    sampler = recipe.sampler
    noisy = range(sampler.num_steps) if sampler.window is None else set(sampler.window)
    before_last = sum(step < sampler.num_steps - 1 for step in noisy)
    steps_per_sample(recipe, 0 if sampler.kind == "ode" or sampler.eta == 0 else before_last)


def steps_per_sample(recipe: Recipe, stochastic: int) -> int:
    """How many steps a sample is trained on, of so many stochastic ones before the last.

    Raises:
        ValueError: none.
    """
    if stochastic == 0:
        raise ValueError(_without_noise(recipe.sampler))
    fraction = recipe.train.timestep_fraction
    found = int(fraction * stochastic + 1e-9)
    if found < 1:
        raise ValueError(
            f"train.timestep_fraction: got {fraction} of {stochastic} stochastic steps before the last, want at least "
            "one step"
        )
    return found


def _without_steps(recipe: Recipe, table: TransitionTable, turns: Sequence[int], expert: int) -> str:
    """Of two denoisers one has no step that could be trained on."""
    sampler, other = recipe.sampler, "below" if expert == 0 else "above"
    times = ", ".join(f"{time:.3g}" for time in table.numbers)
    more = "" if expert == 0 else ', or model.second_expert "frozen"'
    return (
        f"sampler.num_steps: got {sampler.num_steps} steps at {times}, of which all with noise before the last are "
        f"{other} the boundary of the model's two denoisers; want more, or another shift or window{more}"
    )


def _without_noise(sampler: SamplerSettings) -> str:
    if sampler.kind == "ode":
        return 'sampler.kind: got "ode", want one with noise to train on'
    if sampler.eta == 0:
        return "sampler.eta: got 0, want more than 0, for noise to train on"
    return f"sampler.window: got {sampler.window}, want at least one step with noise before the last"
