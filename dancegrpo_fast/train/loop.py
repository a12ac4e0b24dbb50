"""The loop: prompts, rollout, rewards, advantages, updates, checkpoint."""

import time
import warnings
from contextlib import nullcontext
from typing import Any

from torch.random import fork_rng

from ..files import append_rows, replacing
from ..marks import phase
from ..progress import counted, say
from ..prompts import prompts_of_iteration
from ..run.sheets import save_samples
from ..run.words import progress_line
from ..stopping import Stopped
from .clock import Clock
from .finite import check_finite
from .held_out import RewardFailedError
from .metrics import Tally, metrics_row
from .setup import Setup
from .state import rng_tensors, set_rng_tensors


class Trainer(Setup):
    """A run of a recipe: `Trainer(recipe, resume="auto").run()`. `Setup` says what it is made of and refuses."""

    def run(self) -> None:
        """Trains to the last iteration, saving and evaluating on the way.

        Raises:
            Stopped: in every process, after a signal; a checkpoint of the last whole iteration is there, if one was.
        """
        self.done = self.start
        with self.stop:
            self._greet()
            try:
                self._train()
            except Stopped:
                newest = self.directory.newest()
                [saved, *_] = self.processes.collect([newest is not None and int(newest.name) == self.done])
                if self.done > 0 and not saved:
                    self._save(self.done)
                self._end()
                raise
            self._save_model("model")
            if self.average is not None:
                with self.average.applied():
                    self._save_model("model_ema")
        self._end()

    def _train(self) -> None:
        iterations, began = self.recipe.train.iterations, time.perf_counter()
        # Of a run that was killed between a checkpoint and its evaluation, too.
        self._evaluate(self.start)
        for iteration in range(self.start + 1, iterations + 1):
            generators = rng_tensors()
            try:
                row = self.iteration(iteration)
            except Stopped:
                # Rewards of the samples that are dropped may have drawn numbers.
                set_rng_tensors(generators)
                raise
            self.done = iteration
            self._log(row, (time.perf_counter() - began) / (iteration - self.start) * (iterations - iteration))
            if iteration == iterations or iteration % self.recipe.checkpoint_every == 0:
                self._save(iteration)
            self.stop.agree()
            self._evaluate(iteration)

    def _end(self) -> None:
        # A group that a process leaves is of no use to one that still has something to gather.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def iteration(self, iteration: int) -> dict[str, Any]:
        """One rollout and its updates; returns the row of `metrics.jsonl`, the same in every process."""
        train, tally = self.recipe.train, Tally(self.loss.metrics)
        prompts = prompts_of_iteration(self.prompts, train.prompts_per_iteration, iteration - 1, self.recipe.seed)
        batch = self.collect(iteration, prompts)
        clock = Clock()
        for number, (calls, made) in enumerate(counted(self.updates.plan(batch, iteration, tally), "updates")):
            changed = phase("replay forward")(self.updates.backward)(batch, calls, made, tally, first=number == 0)
            with phase("optimizer"):
                tally.grad_norms.append(self.optimizer.step(changed))
                if self.average is not None:
                    self.average.update()
        row = metrics_row(iteration, self.rewards.names, train.group_size, batch, tally, self.processes)
        clock.stop("train")
        row["seconds"] = batch.seconds | clock.seconds
        return row

    def _greet(self) -> None:
        name = self.recipe.name
        packing = "are filled without gaps" if self.rows_are_equal else "keep every sample in its row"
        self._say(
            f"{name}: {len(self.parameters)} trained tensors, {self.loss.pairs_per_sample} of {len(self.table)} "
            f"steps a sample, model calls of {self.policy.rows} rows, which {packing} in the replay, "
            f"{self.processes.name}"
        )
        if self.start == self.recipe.train.iterations:
            self._say(f"{name}: all {self.start} iterations are done, for more raise train.iterations")

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            say(text)

    def _log(self, row: dict[str, Any], seconds_left: float) -> None:
        if self.processes.is_main:
            append_rows(self.directory.metrics, [row])
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=row["iteration"])
        self._say(progress_line(row, self.recipe.train.iterations, seconds_left))

    def _evaluate(self, iteration: int) -> None:
        """Where it is due and not there yet. Once something was trained, a reward that fails leaves a gap."""
        settings, last = self.recipe.evaluation, self.recipe.train.iterations
        if self.evaluator is None or settings is None or (iteration != last and iteration % settings.every):
            return
        [there, *_] = self.processes.collect([self.directory.evaluated(iteration) if self.processes.is_main else set()])
        for sampler in ("ode", "sde"):
            if sampler in there:
                continue
            try:
                # What rewards draw of torch's generators, in an evaluation that a resumed run has or has not to make.
                with (
                    fork_rng([self.device] if self.device.type == "cuda" else []),
                    nullcontext() if self.average is None else self.average.applied(),
                    self.processes.sampling(self.model.denoiser, self.recipe.train.rollout_replica),
                ):
                    result = self.evaluator(sampler)
            except RewardFailedError as error:
                if iteration == 0:
                    raise
                if self.processes.is_main:
                    warnings.warn(f"evaluation {iteration} ({sampler.upper()}) is left out: {error}", stacklevel=2)
                continue
            if self.processes.is_main:
                row = {"iteration": iteration, "sampler": sampler, "diversity": result.diversity, **result.scores}
                shown = [prompt.text for prompt in self.evaluator.prompts[: len(result.grid)]]
                folder, fps = self.directory.root / "samples", self.recipe.sampler.fps
                save_samples(folder, iteration, sampler, result.grid, shown, fps)
                # Last: a row says that the evaluation is whole.
                append_rows(self.directory.evaluations, [row])
            scores = "  ".join(f"{name} {value:.3f}" for name, value in result.scores.items())
            self._say(f"evaluation {iteration} ({sampler.upper()}): {scores}  diversity {result.diversity:.3f}")

    def _save(self, iteration: int) -> None:
        self.state.save(
            self.directory,
            iteration,
            self.recipe.keep_checkpoints,
            prompts_seen=iteration * self.recipe.train.prompts_per_iteration,
            rows_are_equal=self.rows_are_equal,
        )

    def _save_model(self, name: str) -> None:
        check_finite({name: self.parameters}, self.processes, self.done, self.directory.newest())
        with self.processes.whole(self.model.denoiser) as denoiser:
            if denoiser is not None:
                size = sum(parameter.nbytes for parameter in self.parameters.values())
                with replacing(self.directory.root / name, size) as folder:
                    self.model.save(denoiser, folder)
