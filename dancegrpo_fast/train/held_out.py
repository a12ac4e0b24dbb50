"""Fixed prompts and noises, ODE and SDE samples, every score and the diversity that is left."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..models import check_frames, decode, of_evaluation
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
    """A reward of the evaluation raised, returned what is no score, or left out too many samples."""


@contextmanager
def _rewards_fail() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RewardFailedError(str(error)) from error.__cause__


@dataclass(frozen=True)
class Evaluation:
    """Mean scores by name, the diversities by name, and the frames of the pictures `[prompts, samples, T, 3, H, W]`.

    A mean is over the means of prompts. `dropped` samples lack a score, and are not in it.
    """

    scores: dict[str, float]
    dropped: int
    spread: dict[str, float | None]
    grid: Tensor


@dataclass(frozen=True)
class ScoredSet:
    """All samples of some neighbouring prompts.

    Attributes:
        first: place of the first prompt.
        prompts: P of them.
        frames: float32 `[P * samples_per_prompt, T, 3, H, W]` on the CPU, samples of a prompt are neighbours.
        scores: float32 `[K, P * samples_per_prompt]`; NaN where a sample has none.
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


def accepted_diversity(frames: Tensor, accepted: Tensor) -> float | None:
    """`diversity` of the accepted ones among the samples of a prompt; None where there are fewer than two.

    How many they are does not bias it: it is `diversity` where all are accepted, and its expectation over few is that
    over all (of the variance).

    Args:
        frames: `[S, T, 3, H, W]`.
        accepted: bool `[S]`.
    """
    count, total = int(accepted.sum()), len(frames)
    if count < 2:
        return None
    return diversity(frames[accepted], count) * math.sqrt(count / (count - 1) * (total - 1) / total)


# Place of the first prompt, scores, diversity times prompts, `accepted`, and frames of the pictures.
Part: TypeAlias = tuple[int, Tensor, float, list[float | None], Tensor]


@dataclass
class Evaluator:
    """Samples the same noises at every call and scores them.

    A few prompts are sampled, decoded and scored at a time, so that memory does not grow with the prompts. Noise and
    steps are keyed by prompt and sample: how many are drawn together changes nothing.

    Attributes:
        recipe: its sampler and seed count.
        settings: what it samples otherwise, and what it scores.
        policy: the model as training calls it; afterwards as evaluation does.
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
        label = self.settings.accepted_by
        self._judge = None if label is None else self.rewards.names.index(label)
        sampler, model = self.settings.sampling(self.recipe.sampler), self.policy.model
        with of_evaluation():
            if sampler != self.recipe.sampler:
                model = model.at(sampler)
                self.policy = Policy.of(self.recipe, model, sampler)
            self._tables = {name: model.table(sampler, deterministic=name == "ode") for name in self.settings.samplers}

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
        conditioning = self.residence.encode(prompts, policy.model)
        self.residence.use("denoiser")
        draw = Draw(policy, self._tables[sampler], conditioning, derive_seed(self._seed, "steps"))
        trajectory = draw.samples(noise, place // samples, ids)
        self.residence.use("vae")
        frames = decode(policy.model, trajectory.final, policy.rows)
        check_frames(frames, trajectory.final)
        self.residence.use(self.rewards)
        groups = [group for group in range(len(prompts)) for _ in range(samples)]
        with _rewards_fail():
            given = reward_input(frames, prompts, groups, self.recipe.sampler.fps)
            scores = self.processes.once(lambda: self.rewards(given))
        return ScoredSet(part.start, prompts, frames, scores)

    def accepted(self, found: ScoredSet) -> list[float | None]:
        """`accepted_diversity` of each prompt of a set; nothing where the settings name no judge."""
        if self._judge is None:
            return []
        samples = self.settings.samples_per_prompt
        accepted = found.scores[self._judge] > 0.5
        pairs = zip(found.frames.split(samples), accepted.split(samples), strict=True)
        return [accepted_diversity(frames, those) for frames, those in pairs]

    def __call__(self, sampler: str) -> Evaluation:
        """Evaluates with "ode" or "sde" samples; the processes share out the sets, and each gets the whole result.

        Raises:
            RewardFailedError: in every process, where a reward failed in one of them.
            Stopped: in every process.
        """
        sets, processes = self.sets(), self.processes
        shares = [sets[index :: processes.groups] for index in range(processes.groups)]
        parts, failed = self.stop.leave_when_asked(lambda: self._parts(sampler, shares))
        self.residence.use("denoiser")
        for reason in processes.collect([failed and str(failed)]):
            if reason is not None:
                raise failed or RewardFailedError(reason)
        parts = sorted(processes.collect(parts if processes.leads else []), key=lambda part: part[0])
        scores = torch.cat([scores for _, scores, *_ in parts], dim=1)
        with _rewards_fail():
            self.rewards.check_dropped(scores)
        spread: dict[str, float | None] = {"diversity": sum(of_set for _, _, of_set, *_ in parts) / len(self.prompts)}
        if self._judge is not None:
            kept = [one for *_, accepted, _ in parts for one in accepted if one is not None]
            spread |= {"diversity_accepted": sum(kept) / len(kept) if kept else None, "accepted_prompts": len(kept)}
        # Of prompts, each once, however many of its samples have a score; as `evaluate` has it.
        means = scores.double().unflatten(1, (len(self.prompts), -1)).nanmean(dim=2).nanmean(dim=1)
        return Evaluation(
            dict(zip(self.rewards.names, means.tolist(), strict=True)),
            int(scores.isnan().any(dim=0).sum()),
            spread,
            torch.cat([grid for *_, grid in parts]),
        )

    def _parts(self, sampler: str, shares: Sequence[Sequence[slice]]) -> tuple[list[Part], RewardFailedError | None]:
        """What this process makes of its share, up to where a reward fails."""
        settings, samples, processes = self.settings, self.settings.samples_per_prompt, self.processes
        parts: list[Part] = []
        done, failed = 0, None
        for part in shares[processes.group]:
            done += 1
            try:
                found = self.score(sampler, part)
            except RewardFailedError as error:
                failed = error
                break
            left = max(0, settings.grid_prompts - found.first)
            grouped = found.frames.reshape(len(found.prompts), samples, *found.frames.shape[1:])
            # A picture of its own, not the memory of all frames.
            grid = grouped[:left, : settings.grid_samples or 3].clone()
            whole = diversity(found.frames, samples) * len(found.prompts)
            parts.append((found.first, found.scores, whole, self.accepted(found), grid))
        if processes.sharded:
            table, rows = self._tables[sampler], self.policy.rows
            sizes = [[len(self.prompts[part]) * samples for part in share] for share in shares]
            calls = [[model_calls(rows, len(table), 0, size) for size in each] for each in sizes]
            made, most = sum(calls[processes.group][:done]), max(map(sum, calls))
            one = self.residence.encode(self.prompts[:1], self.policy.model)
            fill_calls(self.policy, table, one, [made, most], 0)
        return parts, failed
