"""An iteration's samples: drawn, decoded and scored by the process that has them, and what is kept of them."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..advantages import best_and_worst, group_advantages
from ..marks import phase
from ..models import Conditioning, GeneratorModel, decode
from ..ops.noise import gaussian_noise
from ..processes import Processes, share
from ..prompts import Prompt
from ..recipe import Recipe, SamplerSettings
from ..rewards import RewardInput, RewardSet
from ..rng import derive_seed, generator
from ..transitions import TransitionTable
from .draw import Policy, Start, fill_calls, model_calls, sample, shared_start, shared_step
from .residence import Residence
from .trajectory import Trajectory
from .update import Experience


@dataclass(frozen=True)
class Batch:
    """The samples of an iteration.

    Attributes:
        data: those of this process that are trained on.
        kept: their places among the iteration's B samples, ascending.
        chosen: places of all processes' samples that are trained on, ascending.
        rewards: float32 `[K, B]`, of all processes.
        advantages: float32 `[B]`.
        seconds: that this process spent on "sample" and "reward".
    """

    data: Experience
    kept: Sequence[int]
    chosen: Sequence[int]
    rewards: Tensor
    advantages: Tensor
    seconds: dict[str, float]


class Sampler:
    """Draws and scores the samples of an iteration.

    Samples are keyed by their number in the run, so that how many processes there are changes none of them. With
    best-of-N, whole groups are drawn, scored and thinned out a set at a time: trajectories that are not trained on
    are never there for all groups at once. A group that processes share is thinned out when all have scored it.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: GeneratorModel,
        table: TransitionTable,
        trainable_steps: Sequence[int],
        rewards: RewardSet,
        processes: Processes,
        residence: Residence,
    ) -> None:
        self.batch = recipe.train.prompts_per_iteration * recipe.train.group_size
        smallest = self.batch // processes.count
        if recipe.train.micro_batch > smallest:
            raise ValueError(
                f"train.micro_batch: got {recipe.train.micro_batch}, want at most the {smallest} samples "
                f"of each of {processes.count} processes"
            )
        self._recipe, self._model, self._table = recipe, model, table
        self._trainable_steps = trainable_steps
        self.steps_per_sample = int(recipe.train.timestep_fraction * len(trainable_steps) + 1e-9)
        if not trainable_steps:
            raise ValueError(_without_noise(recipe.sampler))
        if self.steps_per_sample < 1:
            raise ValueError(
                f"train.timestep_fraction: got {recipe.train.timestep_fraction} of {len(trainable_steps)} "
                "stochastic steps before the last, want at least one step"
            )
        if recipe.train.prompts_per_iteration % processes.count and rewards.compares_groups:
            raise ValueError(
                f"train.prompts_per_iteration: got {recipe.train.prompts_per_iteration} on {processes.count} "
                "processes, want a multiple of them where a reward compares the samples of a group"
            )
        self._rewards, self._processes, self._residence = rewards, processes, residence

    def __call__(self, policy: Policy, iteration: int, prompts: Sequence[Prompt]) -> Batch:
        """The samples of iteration `iteration` (from 1), `group_size` of each of `prompts`."""
        clock = Clock()
        group, mine = self._recipe.train.group_size, self._processes.share(self.batch)
        ours = prompts[mine.start // group : -(-mine.stop // group)]
        conditioning = phase("text encoding")(self._residence.encode)(ours)
        rewards = torch.zeros(len(self._rewards.names), self.batch)
        parts = self._parts(policy, mine)
        start: Start | Tensor | None = None
        kept: list[int] = []
        buffer: Trajectory | None = None
        for part in parts:
            self._residence.use("denoiser")
            with self._processes.sampling(policy.model.denoiser, self._recipe.train.rollout_replica):
                if start is None:
                    start = self._start(policy, iteration, mine, conditioning)
                trajectory = self._draw(policy, iteration, mine, part, start, conditioning)
                if part is parts[-1]:
                    fill_calls(policy, self._table, conditioning, self._missing_calls(policy))
            self._residence.use("vae")
            frames = phase("decode")(decode)(self._model, trajectory.denoised, policy.rows)
            clock.stop("sample")
            self._residence.use(self._rewards)
            rewards[:, part.start : part.stop] = self._score(frames, part, prompts)
            clock.stop("reward")
            if len(parts) > 1:
                found = [place for place in self._choose(self._advantages(rewards)) if place in part]
                if buffer is None:
                    buffer = trajectory.like(len(found) * len(mine) // len(part))
                buffer.put(len(kept), trajectory, torch.tensor(found, device=self._processes.device) - part.start)
                kept += found
        self._residence.use("denoiser")
        rewards = self._processes.sum(rewards).cpu()
        advantages = self._advantages(rewards)
        chosen = self._choose(advantages)
        if buffer is None:
            buffer, kept = trajectory, [place for place in chosen if place in mine]
            if len(kept) < len(mine):
                buffer = trajectory.like(len(kept))
                there = torch.tensor(kept, dtype=torch.int64, device=self._processes.device)
                buffer.put(0, trajectory, there - mine.start)
        data = self._experience(policy, iteration, mine, kept, buffer, conditioning, advantages)
        return Batch(data, kept, chosen, rewards, advantages, clock.seconds)

    def _parts(self, policy: Policy, mine: range) -> list[range]:
        """This process's samples in the sets that are drawn one after the other."""
        group, size = self._recipe.train.group_size, len(mine)
        if self._recipe.train.best_of_n is not None and mine.start % group == 0 and mine.stop % group == 0:
            # A set ends where a model call does: its samples have the rows and neighbours that they have undivided.
            size = math.lcm(group, policy.rows)
        return [mine[first : first + size] for first in range(0, len(mine), size)]

    def _missing_calls(self, policy: Policy) -> int:
        """Model calls by which this process has fewer than another one, where they gather parameters together."""
        if not self._processes.sharded:
            return 0
        group, shared = self._recipe.train.group_size, self._recipe.sampler.shared_noise
        calls: list[int] = []
        for index in range(self._processes.count):
            part = share(self.batch, index, self._processes.count)
            prompts = -(-part.stop // group) - part.start // group
            calls.append(model_calls(policy, self._table, prompts, len(part), shared=shared))
        return max(calls) - calls[self._processes.index]

    def _ids(self, iteration: int, places: Iterable[int]) -> Tensor:
        return torch.tensor([(iteration - 1) * self.batch + place for place in places], device=self._processes.device)

    def _start(self, policy: Policy, iteration: int, mine: range, conditioning: Conditioning) -> Start | Tensor:
        """What samples of a prompt share, or the initial latents of every sample."""
        sampler, group = self._recipe.sampler, self._recipe.train.group_size
        first = mine.start // group * group
        noise = gaussian_noise(
            self._model.latent_shape,
            seed=derive_seed(self._recipe.seed, "initial latents"),
            sample_ids=self._ids(iteration, range(first, mine.stop, group) if sampler.shared_noise else mine),
            dtype=sampler.torch_dtype(),
        )
        if not sampler.shared_noise:
            return noise
        return phase("rollout")(shared_start)(
            policy, self._table, noise, conditioning, keep_outputs=self._recipe.train.ratio_norm
        )

    def _draw(
        self,
        policy: Policy,
        iteration: int,
        mine: range,
        part: range,
        start: Start | Tensor,
        conditioning: Conditioning,
    ) -> Trajectory:
        if isinstance(start, Tensor):
            start = start[part.start - mine.start : part.stop - mine.start]
        return phase("rollout")(sample)(
            policy,
            self._table,
            start,
            torch.tensor(self._prompt_rows(mine, part), device=self._processes.device),
            conditioning,
            seed=derive_seed(self._recipe.seed, "steps"),
            sample_ids=self._ids(iteration, part),
            keep_outputs=self._recipe.train.ratio_norm,
        )

    def _prompt_rows(self, mine: range, places: Iterable[int]) -> list[int]:
        """Rows of this process's conditioning."""
        group = self._recipe.train.group_size
        return [place // group - mine.start // group for place in places]

    def _score(self, frames: Tensor, part: range, prompts: Sequence[Prompt]) -> Tensor:
        groups = [place // self._recipe.train.group_size for place in part]
        return phase("rewards")(self._rewards)(
            RewardInput(
                frames=frames,
                prompts=[prompts[group].text for group in groups],
                group=torch.tensor(groups),
                meta=[prompts[group].meta for group in groups],
                fps=self._recipe.sampler.fps,
            )
        )

    def _advantages(self, rewards: Tensor) -> Tensor:
        return group_advantages(rewards, self._recipe.train.group_size, weights=self._rewards.weights)

    def _choose(self, advantages: Tensor) -> list[int]:
        """Places of the samples that are trained on; of a group whose rewards are not there yet, of any."""
        train = self._recipe.train
        if train.best_of_n is None:
            return list(range(self.batch))
        chosen: list[int] = best_and_worst(advantages, train.group_size, train.best_of_n).tolist()
        return chosen

    def _experience(
        self,
        policy: Policy,
        iteration: int,
        mine: range,
        kept: Sequence[int],
        trajectory: Trajectory,
        conditioning: Conditioning,
        advantages: Tensor,
    ) -> Experience:
        steps = []
        for place in kept:
            number = (iteration - 1) * self.batch + place
            order = torch.randperm(
                len(self._trainable_steps), generator=generator(self._recipe.seed, "timesteps", number)
            )
            steps.append([self._trainable_steps[i] for i in order[: self.steps_per_sample].tolist()])
        ours = advantages[torch.tensor(kept, dtype=torch.int64)]
        prompts = self._prompt_rows(mine, kept)
        return Experience(
            trajectory=trajectory,
            conditioning=conditioning,
            advantages=ours.to(self._processes.device),
            advantages_host=ours.tolist(),
            prompts=torch.tensor(prompts, dtype=torch.int64, device=self._processes.device),
            prompts_host=prompts,
            rows=[(place - mine.start) % policy.rows for place in kept],
            steps=steps,
            shared_step=shared_step(self._table) if self._recipe.sampler.shared_noise else None,
        )


def _without_noise(sampler: SamplerSettings) -> str:
    if sampler.kind == "ode":
        return 'sampler.kind: got "ode", want one with noise to train on'
    if sampler.eta == 0:
        return "sampler.eta: got 0, want more than 0, for noise to train on"
    return f"sampler.window: got {sampler.window}, want at least one step with noise before the last"


class Clock:
    """Seconds by what they were spent on, from one `stop` to the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def stop(self, name: str) -> None:
        """What passed since the last `stop` was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
