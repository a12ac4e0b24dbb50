"""The loop: prompts, rollout, rewards, advantages, updates, checkpoint."""

import json
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.random import fork_rng

from ..files import append_rows, replacing, write_text
from ..marks import phase
from ..progress import counted, say
from ..prompts import prompts_of_iteration
from ..run.folder import SAVED
from ..run.sheets import save_samples
from ..run.words import progress_line, spread_text
from ..stopping import Stopped
from .calls import Call
from .clock import Clock
from .collect import Batch
from .finite import check_finite
from .held_out import RewardFailedError
from .metrics import Tally, metrics_row
from .schedule import learning_rate
from .setup import Setup
from .state import rng_tensors, set_rng_tensors


class Trainer(Setup):
    """A run of a recipe: `Trainer(recipe, resume="auto").run()`. `Setup` says what it is made of and refuses."""

    def run(self) -> None:
        """Trains to the last iteration, saving and evaluating on the way.

        Raises:
            Stopped: in every process, after a signal; a checkpoint of the last whole iteration is there, if one was.
        """
        if self.finished:
            more = ", for more raise train.iterations" if self.recipe.train.schedule == "constant" else ""
            self._say(f"{self.recipe.name}: all {self.start} iterations are done{more}")
            self.accelerator.end_training()
            return
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
            if self.changes and iteration == self.start + 1:
                row["changes"] = {one.field: [one.then, one.now] for one in self.changes}
            self._log(row, (time.perf_counter() - began) / (iteration - self.start) * (iterations - iteration))
            if iteration == iterations or iteration % self.recipe.checkpoint_every == 0:
                self._save(iteration)
            self.stop.agree()
            self._evaluate(iteration)

    def _end(self) -> None:
        # A group that a process leaves is of no use to one that still has something to gather.
        self.accelerator.wait_for_everyone()
        self.tracking.finish()
        self.accelerator.end_training()

    def iteration(self, iteration: int) -> dict[str, Any]:
        """One rollout and its updates; returns the row of `metrics.jsonl`, the same in every process."""
        train, tally = self.recipe.train, Tally(self.loss.metrics, len(self.table))
        prompts = prompts_of_iteration(self.prompts, train.prompts_per_iteration, iteration - 1, self.recipe.seed)
        batch = self.collect(iteration, prompts)
        clock = Clock()
        for number, (calls, made) in enumerate(counted(self.updates.plan(batch, iteration, tally), "updates")):
            rate = learning_rate(train, (iteration - 1) * train.updates_per_iteration + number)
            tally.grad_norms.append(self._update(batch, calls, made, tally, rate, first=number == 0))
        row = metrics_row(iteration, self.rewards.names, train, batch, tally, self.processes)
        row["learning_rate"] = rate
        if self.recipe.model.dtype == "float16":
            row["loss_scale"] = self.optimizer.loss_scale
        clock.stop("train")
        row["seconds"] = batch.seconds | clock.seconds
        row["speed"] = self.speed.of(row)
        return row

    def _update(
        self, batch: Batch, calls: Sequence[Call], made: int, tally: Tally, rate: float, *, first: bool
    ) -> Tensor:
        """One step of the optimiser, whose gradients are made again while they leave float16's range; their norm."""
        while True:
            scale = self.optimizer.loss_scale
            changed = phase("replay forward")(self.updates.backward)(
                batch, calls, made, tally, first=first, scale=scale
            )
            with phase("optimizer"):
                norm = self.optimizer.step(changed, rate)
                if norm is not None:
                    if self.average is not None:
                        self.average.update()
                    return norm
            # The same calls are not counted again.
            tally = Tally(tally.names, tally.steps)

    def _greet(self) -> None:
        name = self.recipe.name
        packing = "are filled without gaps" if self.rows_are_equal else "keep every sample in its row"
        self._say(
            f"{name}: {len(self.parameters)} trained tensors, {self.loss.pairs_per_sample} of {len(self.table)} "
            f"steps a sample, model calls of {self.policy.rows} rows, which {packing} in the replay, "
            f"{self.processes.name}"
        )
        if self.start > 0:
            self._say(f"goes on after iteration {self.start}")
        for change in self.changes:
            self._say(f"from iteration {self.start + 1} on {change.told()}; bits differ from an unchanged run's")
        for note in self.notes:
            self._say(note)

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            say(text)

    def _log(self, row: dict[str, Any], seconds_left: float) -> None:
        if self.processes.is_main:
            append_rows(self.directory.metrics, [row])
        flat = row | {f"{name}/{part}": row[name][part] for name in ("seconds", "speed") for part in row[name]}
        self.tracking.log(row["iteration"], flat)
        self._say(progress_line(row, self.recipe.train.iterations, seconds_left))

    def _evaluate(self, iteration: int) -> None:
        """Where it is due and not there yet. Once something was trained, a reward that fails leaves a gap."""
        settings, last = self.recipe.evaluation, self.recipe.train.iterations
        if self.evaluator is None or settings is None or (iteration != last and iteration % settings.every):
            return
        [there, *_] = self.processes.collect([self.directory.evaluated(iteration) if self.processes.is_main else set()])
        average = self.average if settings.ema else None
        for sampler in settings.samplers:
            if sampler in there:
                continue
            try:
                # What rewards draw of torch's generators, in an evaluation that a resumed run has or has not to make.
                with (
                    fork_rng([self.device] if self.device.type == "cuda" else []),
                    nullcontext() if average is None else average.applied(),
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
                row: dict[str, Any] = {"iteration": iteration, "sampler": sampler, "dropped": result.dropped}
                row |= result.spread | result.scores
                shown = [prompt.text for prompt in self.evaluator.prompts[: len(result.grid)]]
                folder, fps = self.directory.root / "samples", self.recipe.sampler.fps
                picture = save_samples(folder, iteration, sampler, result.grid, shown, fps)
                # Last: a row says that the evaluation is whole.
                append_rows(self.directory.evaluations, [row])
                told = {f"evaluation/{sampler}/{name}": row[name] for name in row if name != "iteration"}
                self.tracking.log(iteration, told)
                self.tracking.show(iteration, f"samples/{sampler}", picture)
            scores = "  ".join(f"{name} {value:.3f}" for name, value in result.scores.items())
            spread = spread_text(result.spread)
            self._say(f"evaluation {iteration} ({sampler.upper()}): {scores}  {spread}")

    def _save(self, iteration: int) -> None:
        self.state.save(
            self.directory,
            iteration,
            self.recipe.keep_checkpoints,
            prompts_seen=iteration * self.recipe.train.prompts_per_iteration,
            rows_are_equal=self.rows_are_equal,
            **self.history,
        )

    def _save_model(self, name: str) -> None:
        check_finite({name: self.parameters}, self.processes, self.done, self.directory.newest())
        with self.processes.whole(self.model.denoiser) as denoiser:
            if denoiser is not None:
                size = sum(parameter.nbytes for parameter in self.parameters.values())
                with replacing(self.directory.root / name, size) as folder:
                    self.model.save(denoiser, folder)
                    write_text(folder / SAVED, json.dumps({"iteration": self.recipe.train.iterations}))
