"""Fixed prompts and noises, ODE and SDE samples, every score and the diversity that is left."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..models import decode
from ..ops.noise import gaussian_noise
from ..processes import Processes
from ..prompts import Prompt
from ..recipe import EvaluationSettings, Recipe
from ..rewards import RewardSet
from ..rng import derive_seed
from ..stopping import Stop
from .calls import Policy, chunks, fill_calls, model_calls
from .collect import reward_input
from .draw import Draw
from .residence import Residence


class RewardFailedError(RuntimeError):
    """A reward of the evaluation raised, or returned what is no score."""


@dataclass(frozen=True)
class Evaluation:
    """Mean scores by name, diversity, and the frames of the pictures `[prompts, samples, T, 3, H, W]`."""

    scores: dict[str, float]
    diversity: float
    grid: Tensor


@dataclass(frozen=True)
class ScoredSet:
    """All samples of some neighbouring prompts.

    Attributes:
        first: place of the first prompt.
        prompts: P of them.
        frames: float32 `[P * samples_per_prompt, T, 3, H, W]` on the CPU, samples of a prompt are neighbours.
        scores: float32 `[K, P * samples_per_prompt]`.
    """

    first: int
    prompts: Sequence[Prompt]
    frames: Tensor
    scores: Tensor


def diversity(frames: Tensor, samples_per_prompt: int) -> float:
    """Standard deviation of each pixel over the samples of a prompt, averaged over pixels and prompts.

    Args:
        frames: `[P * samples_per_prompt, T, 3, H, W]`, samples of a prompt are neighbours.
        samples_per_prompt: at least 2.
    """
    grouped = frames.unflatten(0, (-1, samples_per_prompt))
    # A frame at a time: float64 copies of videos would be several times their memory.
    spreads = [one.double().std(dim=1, correction=0).mean() for one in grouped.unbind(2)]
    return float(torch.stack(spreads).mean())


# Place of the first prompt, scores, diversity times prompts, and frames of the pictures.
Part: TypeAlias = tuple[int, Tensor, float, Tensor]


@dataclass
class Evaluator:
    """Samples the same noises at every call and scores them.

    A few prompts are sampled, decoded and scored at a time, so that memory does not grow with the prompts. Noise and
    steps are keyed by prompt and sample: how many are drawn together changes nothing.

    Attributes:
        recipe: its sampler and seed count.
        residence: the rewards are added to it.
        stop: a signal ends a call, with Stopped.
        rewards: the scores.
    """

    recipe: Recipe
    settings: EvaluationSettings
    prompts: Sequence[Prompt]
    policy: Policy
    processes: Processes
    residence: Residence
    stop: Stop = field(default_factory=Stop)

    def __post_init__(self) -> None:
        self._seed = derive_seed(self.recipe.seed, "evaluation")
        self.rewards = RewardSet(self.settings.rewards)
        self.residence.add(self.rewards)
        model, sampler = self.policy.model, self.recipe.sampler
        self._tables = {"ode": model.table(sampler, deterministic=True), "sde": model.table(sampler)}

    def sets(self) -> list[slice]:
        """The prompts in sets whose samples fill model calls, as far as whole prompts can."""
        samples = self.settings.samples_per_prompt
        return list(chunks(len(self.prompts), math.lcm(self.policy.rows, samples) // samples))

    def score(self, sampler: str, part: slice) -> ScoredSet:
        """Samples ("ode" or "sde") and scores the prompts of one set.

        Raises:
            RewardFailedError: there are no scores.
        """
        policy, prompts, samples = self.policy, self.prompts[part], self.settings.samples_per_prompt
        place = torch.arange(len(prompts) * samples, device=self.processes.device)
        ids = place + part.start * samples
        noise = gaussian_noise(
            policy.model.latent_shape,
            seed=derive_seed(self._seed, "noise"),
            sample_ids=ids,
            dtype=self.recipe.sampler.torch_dtype(),
        )
        conditioning = self.residence.encode(prompts)
        self.residence.use("denoiser")
        draw = Draw(policy, self._tables[sampler], conditioning, derive_seed(self._seed, "steps"))
        trajectory = draw.samples(noise, place // samples, ids)
        self.residence.use("vae")
        frames = decode(policy.model, trajectory.denoised, policy.rows)
        self.residence.use(self.rewards)
        groups = [group for group in range(len(prompts)) for _ in range(samples)]
        try:
            scores = self.rewards(reward_input(frames, prompts, groups, self.recipe.sampler.fps))
        except RuntimeError as error:
            raise RewardFailedError(str(error)) from error.__cause__
        return ScoredSet(part.start, prompts, frames, scores)

    def __call__(self, sampler: str) -> Evaluation:
        """Evaluates with "ode" or "sde" samples; the processes share out the sets, and each gets the whole result.

        Raises:
            RewardFailedError: in every process, where a reward failed in one of them.
            Stopped: in every process.
        """
        sets, processes = self.sets(), self.processes
        shares = [sets[index :: processes.count] for index in range(processes.count)]
        parts, failed = self.stop.leave_when_asked(lambda: self._parts(sampler, shares))
        self.residence.use("denoiser")
        for reason in processes.collect([failed and str(failed)]):
            if reason is not None:
                raise failed or RewardFailedError(reason)
        parts = sorted(processes.collect(parts), key=lambda part: part[0])
        means = torch.cat([scores for _, scores, _, _ in parts], dim=1).mean(dim=1).tolist()
        return Evaluation(
            dict(zip(self.rewards.names, means, strict=True)),
            sum(spread for _, _, spread, _ in parts) / len(self.prompts),
            torch.cat([grid for *_, grid in parts]),
        )

    def _parts(self, sampler: str, shares: Sequence[Sequence[slice]]) -> tuple[list[Part], RewardFailedError | None]:
        """What this process makes of its share, up to where a reward fails."""
        settings, samples, processes = self.settings, self.settings.samples_per_prompt, self.processes
        parts: list[Part] = []
        done, failed = 0, None
        for part in shares[processes.index]:
            done += 1
            try:
                found = self.score(sampler, part)
            except RewardFailedError as error:
                failed = error
                break
            left = max(0, settings.grid_prompts - found.first)
            grouped = found.frames.reshape(len(found.prompts), samples, *found.frames.shape[1:])
            # A picture of its own, not the memory of all frames.
            grid = grouped[:left, : settings.grid_samples].clone()
            parts.append((found.first, found.scores, diversity(found.frames, samples) * len(found.prompts), grid))
        if processes.sharded:
            table, rows = self._tables[sampler], self.policy.rows
            sizes = [[len(self.prompts[part]) * samples for part in share] for share in shares]
            calls = [[model_calls(rows, len(table), 0, size) for size in each] for each in sizes]
            made, most = sum(calls[processes.index][:done]), max(map(sum, calls))
            fill_calls(self.policy, table, self.residence.encode(self.prompts[:1]), [made, most], 0)
        return parts, failed
