"""An iteration's samples: drawn, decoded and scored by the process that has them, and what is kept of them."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..advantages import best_and_worst, group_advantages
from ..marks import phase
from ..models import Conditioning, check_frames, decode
from ..ops.noise import gaussian_noise
from ..processes import Processes, share
from ..prompts import Prompt
from ..recipe import Recipe
from ..rewards import RewardInput, RewardSet
from ..rng import derive_seed
from ..stopping import Stop
from ..transitions import TransitionTable
from .calls import Policy, fill_calls, model_calls
from .clock import Clock
from .draw import Draw, Recorder, Start, shared_step
from .residence import Residence
from .trajectory import Trajectory

# A process's own: seconds, conditioning, the last trajectory, those that are kept of all, their places, rewards.
Drawn: TypeAlias = tuple[Clock, Conditioning, Trajectory, Trajectory | None, list[int], Tensor]


@dataclass(frozen=True)
class Batch:
    """The B samples of an iteration, of which this process trains on n.

    Attributes:
        trajectory: n samples over T steps.
        conditioning: one row per prompt of this process.
        prompts: n rows of `conditioning`.
        rows: n rows of model calls, in which the samples were drawn.
        shared_step: the step whose model call was made once per prompt, in row `prompt % rows`; None: none was.
        kept: n places among the B samples, ascending.
        chosen: places of all processes' samples that are trained on, ascending; no others are looked at.
        valid: bool `[B]`, False for samples that a reward dropped, and for what is left of their group if it is one.
        first: the number in the run of the sample at place 0.
        rewards: float32 `[K, B]`; NaN where one has no score.
        advantages: float32 `[B]`.
        own_advantages: float32 `[n]`, those of `kept`, on the device.
        seconds: that this process spent on "sample" and "reward".
    """

    trajectory: Trajectory
    conditioning: Conditioning
    prompts: Sequence[int]
    rows: Sequence[int]
    shared_step: int | None
    kept: Sequence[int]
    chosen: Sequence[int]
    valid: Tensor
    first: int
    rewards: Tensor
    advantages: Tensor
    own_advantages: Tensor
    seconds: dict[str, float]


def reward_input(frames: Tensor, prompts: Sequence[Prompt], groups: Sequence[int], fps: float | None) -> RewardInput:
    """What rewards see of samples `[B, T, 3, H, W]`, each of `prompts[group]`."""
    own = [prompts[group] for group in groups]
    return RewardInput(frames, [one.text for one in own], torch.tensor(groups), [one.meta for one in own], fps)


class Asked(NamedTuple):
    """A set of samples.

    Attributes:
        part: their places.
        trajectory: theirs.
        dealt: places of those that this process scores.
        scores: `[K, n]` of these, when they are there; None: there are none.
    """

    part: range
    trajectory: Trajectory
    dealt: range
    scores: Future[Tensor] | None


class PartRecorder(Recorder, Protocol):
    """A `Recorder` of samples that are drawn a set at a time."""

    def restart(self) -> None:
        """An iteration begins."""
        ...

    def begin(self, part: range, first: int, device: torch.device) -> None:
        """The samples at the places `part` are drawn next; that at 0 has number `first` in the run."""
        ...

    def keep(self, places: Collection[int]) -> None:
        """Of these no others than those at `places` will be trained on."""
        ...


@dataclass
class Collector:
    """Draws and scores the samples of an iteration.

    Samples are keyed by their number in the run, so that how many processes there are changes none of them. With
    best-of-N, whole groups are drawn, scored and thinned out a set at a time: trajectories that are not trained on
    are never there for all groups at once. A group that processes share is thinned out when all have scored it.

    Attributes:
        keep_outputs: trajectories keep the model's outputs.
        stop: a signal ends a call, with Stopped.
        recorder: takes gradients while samples are drawn; None: there are none.
        batch: B.

    Raises:
        ValueError: a micro-batch larger than the samples of a process, or groups that processes share where a reward
            compares their samples.
    """

    recipe: Recipe
    policy: Policy
    table: TransitionTable
    rewards: RewardSet
    processes: Processes
    residence: Residence
    keep_outputs: bool
    stop: Stop = field(default_factory=Stop)
    recorder: PartRecorder | None = None

    def __post_init__(self) -> None:
        train, count = self.recipe.train, self.processes.groups
        self.batch = train.prompts_per_iteration * train.group_size
        self._group, self._mine = train.group_size, self.processes.share(self.batch)
        self._shared_step = shared_step(self.table) if self.recipe.sampler.shared_noise else None
        if train.micro_batch > self.batch // count:
            raise ValueError(
                f"train.micro_batch: got {train.micro_batch}, want at most the {self.batch // count} samples "
                f"of each of {count} processes"
            )
        if train.overlap_rewards and len(self._parts()) == 1:
            raise ValueError(
                f"train.overlap_rewards: got true for {len(self._mine)} samples of a process, want whole groups, "
                "and more than one set of them that ends where a model call does"
            )
        if train.prompts_per_iteration % count and self.rewards.compares_groups:
            raise ValueError(
                f"train.prompts_per_iteration: got {train.prompts_per_iteration} on {count} "
                "processes, want a multiple of them where a reward compares the samples of a group"
            )

    def __call__(self, iteration: int, prompts: Sequence[Prompt]) -> Batch:
        """The samples of iteration `iteration` (from 1), `group_size` of each of `prompts`.

        Raises:
            Stopped: in every process; nothing has changed.
        """
        return self._batch(iteration, *self.stop.leave_when_asked(lambda: self._drawn(iteration, prompts)))

    def _drawn(self, iteration: int, prompts: Sequence[Prompt]) -> Drawn:
        """What this process does by itself."""
        clock, policy, mine, parts = Clock(), self.policy, self._mine, self._parts()
        first = (iteration - 1) * self.batch
        ours = prompts[mine.start // self._group : -(-mine.stop // self._group)]
        conditioning = phase("text encoding")(self.residence.encode)(ours)
        draw = Draw(policy, self.table, conditioning, derive_seed(self.recipe.seed, "steps"), self.keep_outputs)
        rewards = torch.zeros(len(self.rewards.names), self.batch)
        start: Start | Tensor | None = None
        kept: list[int] = []
        buffer: Trajectory | None = None
        if self.recorder is not None:
            self.recorder.restart()
        asked: list[Asked] = []
        with self._worker() as worker:
            for part in parts:
                self.residence.use("denoiser")
                with self.processes.sampling(policy.model.denoiser, self.recipe.train.rollout_replica):
                    if start is None:
                        start = self._start(draw, first)
                    here = slice(part.start - mine.start, part.stop - mine.start)
                    own = start[here] if isinstance(start, Tensor) else start
                    prompt_rows = self._on_device(self._prompt_rows(part))
                    if self.recorder is not None:
                        self.recorder.begin(part, first, self.processes.device)
                    ids = self._on_device(part) + first
                    trajectory = phase("rollout")(draw.samples)(own, prompt_rows, ids, self.recorder)
                    if part is parts[-1] and self.processes.sharded:
                        fill_calls(policy, self.table, conditioning, self._calls(), self.processes.group)
                asked.append(self._ask(part, trajectory, prompts, worker, clock))
                # One set is scored while the next is drawn.
                while len(asked) > (worker is not None and part is not parts[-1]):
                    scored = asked.pop(0)
                    self._answer(scored, rewards, clock)
                    found: Sequence[int] = scored.part
                    if len(parts) > 1:
                        if self._thins():
                            found = [place for place in self._choose(rewards)[2] if place in scored.part]
                        if buffer is None:
                            # Where nothing is dropped, it is filled.
                            best = (self.recipe.train.best_of_n or 0) if self._thins() else self._group / 2
                            buffer = trajectory.like(int(2 * best) * len(mine) // self._group)
                        buffer.put(len(kept), scored.trajectory, self._on_device(found) - scored.part.start)
                        kept += found
                    if self.recorder is not None:
                        self.recorder.keep(found)
        return clock, conditioning, trajectory, buffer, kept, rewards

    @contextmanager
    def _worker(self) -> Iterator[Callable[[RewardInput], Future[Tensor]] | None]:
        """Has a thread score as this one would; left by a signal or an error, it ends what it is at, and no more."""
        if not self.recipe.train.overlap_rewards:
            yield None
            return
        threads, cuda = torch.get_num_threads(), self.processes.device.type == "cuda"
        index = torch.cuda.current_device() if cuda else None

        def begin() -> None:
            # Both are a thread's own.
            torch.set_num_threads(threads)
            if index is not None:
                torch.cuda.set_device(index)

        failed: list[BaseException] = []

        def score(inputs: RewardInput) -> Tensor:
            if failed:
                raise failed[0]
            try:
                return self.rewards(inputs)
            except BaseException as error:
                failed.append(error)
                raise

        worker = ThreadPoolExecutor(1, "rewards", begin)
        try:
            yield lambda inputs: worker.submit(score, inputs)
        finally:
            worker.shutdown(cancel_futures=True)

    def _ask(
        self,
        part: range,
        trajectory: Trajectory,
        prompts: Sequence[Prompt],
        worker: Callable[[RewardInput], Future[Tensor]] | None,
        clock: Clock,
    ) -> Asked:
        """Decodes a set, or what this process has of it, and scores it, or has it scored."""
        clock.stop("sample")
        # Processes with the same samples share them out here; one may have none.
        dealt = self.processes.scored(part, self._group if self.rewards.compares_groups else 1)
        if not dealt:
            return Asked(part, trajectory, dealt, None)
        self.residence.use("vae")
        final = trajectory.final[dealt.start - part.start : dealt.stop - part.start]
        frames = phase("decode")(decode)(self.policy.model, final, self.policy.rows)
        check_frames(frames, final)
        clock.stop("sample")
        self.residence.use(self.rewards)
        groups = [place // self._group for place in dealt]
        scored = reward_input(frames, prompts, groups, self.recipe.sampler.fps)
        if worker is not None:
            return Asked(part, trajectory, dealt, worker(scored))
        made: Future[Tensor] = Future()
        made.set_result(phase("rewards")(self.rewards)(scored))
        return Asked(part, trajectory, dealt, made)

    def _answer(self, asked: Asked, rewards: Tensor, clock: Clock) -> None:
        """Puts the scores of a set, when they are there, into `[K, B]`."""
        part, dealt = asked.part, asked.dealt
        if asked.scores is not None:
            with phase("rewards"):
                rewards[:, dealt.start : dealt.stop] = asked.scores.result()
        rewards[:, part.start : part.stop] = self.processes.scores(rewards[:, part.start : part.stop])
        clock.stop("reward")

    def _batch(
        self,
        iteration: int,
        clock: Clock,
        conditioning: Conditioning,
        trajectory: Trajectory,
        buffer: Trajectory | None,
        kept: list[int],
        rewards: Tensor,
    ) -> Batch:
        """What all processes have."""
        policy, mine, first = self.policy, self._mine, (iteration - 1) * self.batch
        self.residence.use("denoiser")
        rewards = self.processes.sum(rewards).cpu()
        self.rewards.check_dropped(rewards)
        valid, advantages, chosen = self._choose(rewards)
        if not chosen:
            raise RuntimeError(f"rewards: left no group of iteration {iteration} with two samples, want one at least")
        if buffer is None:
            buffer, kept = trajectory, list(mine)
        if self.recipe.train.best_of_n is not None and not (self._thins() and len(self._parts()) > 1):
            kept, whole = [place for place in chosen if place in mine], buffer
            buffer = whole.like(len(kept))
            buffer.put(0, whole, self._on_device(kept) - mine.start)
        return Batch(
            trajectory=buffer.rows(0, len(kept)),
            conditioning=conditioning,
            prompts=self._prompt_rows(kept),
            rows=[(place - mine.start) % policy.rows for place in kept],
            shared_step=self._shared_step,
            kept=kept,
            chosen=chosen,
            valid=valid,
            first=first,
            rewards=rewards,
            advantages=advantages,
            own_advantages=advantages[torch.tensor(kept, dtype=torch.int64)].to(self.processes.device),
            seconds=clock.seconds,
        )

    def _parts(self) -> list[range]:
        """This process's samples in the sets that are drawn one after the other."""
        mine, size = self._mine, len(self._mine)
        apart = self._thins() or self.recipe.train.overlap_rewards
        if apart and mine.start % self._group == 0 and mine.stop % self._group == 0:
            # A set ends where a model call does: its samples have the rows and neighbours that they have undivided.
            size = math.lcm(self._group, self.policy.rows)
        return [mine[first : first + size] for first in range(0, len(mine), size)]

    def _thins(self) -> bool:
        """Whether it is known which samples of a set are trained on as soon as it is scored."""
        # The deviation of the batch is not known before its last set is scored.
        return self.recipe.train.best_of_n is not None and self.recipe.train.advantages == "group"

    def _calls(self) -> list[int]:
        """Model calls of every process, those with the same samples being one."""
        shared, calls = 0 if self._shared_step is None else self._shared_step + 1, []
        for index in range(self.processes.groups):
            part = share(self.batch, index, self.processes.groups)
            prompts = -(-part.stop // self._group) - part.start // self._group
            calls.append(model_calls(self.policy.rows, len(self.table), prompts, len(part), shared=shared))
        return calls

    def _on_device(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.processes.device)

    def _start(self, draw: Draw, first: int) -> Start | Tensor:
        """What samples of a prompt share, or the initial latents of every sample."""
        mine, group = self._mine, self._group
        if self._shared_step is not None:
            # Keyed by the first sample of a group.
            mine = range(mine.start // group * group, mine.stop, group)
        noise = gaussian_noise(
            self.policy.model.latent_shape,
            seed=derive_seed(self.recipe.seed, "initial latents"),
            sample_ids=self._on_device(mine) + first,
            dtype=self.recipe.sampler.torch_dtype(),
        )
        return noise if self._shared_step is None else phase("rollout")(draw.start)(noise, self._shared_step)

    def _prompt_rows(self, places: Iterable[int]) -> list[int]:
        """Rows of this process's conditioning."""
        return [place // self._group - self._mine.start // self._group for place in places]

    def _choose(self, rewards: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Which samples count, bool `[B]`; advantages `[B]`; and the places of those that are trained on.

        Of a group whose rewards are not there yet, any are.
        """
        scored = ~rewards.isnan().any(dim=0)
        alone = scored.view(-1, self._group).sum(dim=1) < 2
        valid = scored & ~alone.repeat_interleave(self._group)
        train, weights = self.recipe.train, self.rewards.weights
        advantages = group_advantages(
            rewards, self._group, weights=weights, clip=train.advantage_clip, valid=valid, **train.normalisation()
        )
        if train.best_of_n is None:
            return valid, advantages, valid.nonzero().flatten().tolist()
        chosen = best_and_worst(advantages, self._group, train.best_of_n, valid=valid)
        return valid, advantages, chosen.tolist()
