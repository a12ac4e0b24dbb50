"""The loop: prompts, rollout, rewards, advantages, updates, checkpoint."""

import copy
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .advantages import best_and_worst, group_advantages
from .config import Recipe
from .evaluation import Evaluator, decode
from .memory._phases import phase
from .models import load_model
from .ops.noise import gaussian_noise
from .ops.policy_loss import PolicyMetrics
from .prompts import Prompt, load_prompts, prompts_of_iteration
from .replay import Experience, Objective, Tally, backward_update
from .report import progress_line, save_samples
from .rewards import RewardInput, RewardSet
from .rng import derive_seed, generator
from .rollout import Policy, rollout, rows_are_equal

# What may differ between a run and its continuation.
FREE_ON_RESUME = ("output_dir", "checkpoint_every", "keep_checkpoints", "threads")


class RunDirectory:
    """Where a run writes: `metrics.jsonl`, `evaluations.jsonl`, `checkpoints/`, `samples/`, `model/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.metrics = root / "metrics.jsonl"
        self.evaluations = root / "evaluations.jsonl"

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """Adds one JSON line, on disk when this returns."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_until(self, iteration: int) -> None:
        """Drops the rows of iterations that the resumed run will do again."""
        for path in (self.metrics, self.evaluations):
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if self._iteration(line, line is lines[-1]) <= iteration]
                checkpoint.write_text(path, "".join(line + "\n" for line in kept))

    @staticmethod
    def _iteration(line: str, last: bool) -> float:
        try:
            return int(json.loads(line)["iteration"])
        except json.JSONDecodeError:
            # A crash can leave half a last line, which belongs to an iteration that is done again.
            if last:
                return math.inf
            raise


class Trainer:
    """One GRPO run of a recipe.

    Args:
        recipe: the run.
        resume: "auto" continues from the newest checkpoint of the output directory (or starts, where there is none), a
            path continues from that one, None starts anew and refuses a directory that already holds a run.

    Raises:
        ValueError: a recipe that cannot be run, a damaged or foreign checkpoint, an output directory in use.
    """

    def __init__(self, recipe: Recipe, resume: str | None = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import is_tensorboard_available

        self.recipe = recipe
        torch.set_num_threads(recipe.threads or len(os.sched_getaffinity(0)))
        self.directory = RunDirectory(Path(recipe.output_dir or f"runs/{recipe.name}"))
        found = self._find_checkpoint(resume)
        self.accelerator = Accelerator(
            mixed_precision=recipe.train.mixed_precision,
            log_with="tensorboard" if is_tensorboard_available() else None,
            project_dir=str(self.directory.root),
        )
        if self.accelerator.num_processes > 1:
            raise ValueError(f"trainer: got {self.accelerator.num_processes} processes, want one (not supported yet)")
        device = self.device = self.accelerator.device

        self.prompts = load_prompts(recipe.prompts)
        self.rewards = RewardSet(recipe.rewards)
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        evaluation = recipe.evaluation
        evaluated = self.prompts
        if evaluation is not None and evaluation.prompts is not None:
            evaluated = load_prompts(evaluation.prompts, "test")
        self.model = load_model(recipe.model, recipe.sampler, device, [*self.prompts, *evaluated])
        denoiser = self.model.denoiser.eval()
        self.table = self.model.table(recipe.sampler)
        self.trainable_steps = [t for t in range(len(self.table) - 1) if self.table.tau[t] > 0]
        self.steps_per_sample = int(recipe.train.timestep_fraction * len(self.trainable_steps) + 1e-9)
        if self.steps_per_sample < 1:
            raise ValueError(
                f"train.timestep_fraction: got {recipe.train.timestep_fraction} of {len(self.trainable_steps)} "
                "stochastic steps before the last, want at least one step"
            )
        self.names = {p: name for name, p in denoiser.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.names),
            lr=recipe.train.learning_rate,
            weight_decay=recipe.train.weight_decay,
            fused=device.type == "cuda",
        )
        self.objective = self._objective(denoiser)
        self.evaluator = None
        if evaluation is not None:
            self.evaluator = Evaluator(evaluation, recipe.sampler, evaluated, self.model, recipe.seed, device)
        state = {} if found is None else self._restore(found)
        self.start = int(state.get("iteration", 0))
        self.directory.keep_until(self.start if found else -1)
        self.denoiser, self.prepared_optimizer = self.accelerator.prepare(denoiser, self.optimizer)
        self.model.denoiser = self.denoiser
        scale = recipe.sampler.guidance_scale
        policy = Policy(self.model, recipe.train.micro_batch, scale, self.model.unconditional(scale))
        equal = state.get("rows_are_equal")
        if equal is None:
            probe = self.model.encode(self.prompts[: recipe.train.micro_batch])
            equal = rows_are_equal(policy, self.table, probe)
        self.policy = replace(policy, rows_are_equal=equal)
        self.directory.root.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(self.directory.root / "recipe.json", json.dumps(recipe.as_dict(), indent=1))
        self.accelerator.init_trackers("tensorboard")

    def _find_checkpoint(self, resume: str | None) -> Path | None:
        root = self.directory.root
        if resume is None:
            if self.directory.metrics.exists() or checkpoint.complete(self.directory.checkpoints):
                raise ValueError(
                    f"output_dir: {root} already holds a run; continue it with --resume auto, or give another one"
                )
            return None
        found = checkpoint.complete(self.directory.checkpoints)
        if resume == "auto":
            return found[-1] if found else None
        chosen = Path(resume)
        own = chosen.resolve().parent == self.directory.checkpoints.resolve()
        later = [path.name for path in found if not own or path.name > chosen.name]
        if later or (not own and self.directory.metrics.exists()):
            raise ValueError(
                f"resume: {root} holds results that a run from {chosen} would overwrite "
                f"(checkpoints {', '.join(later) or 'none'}); move them away or give another output_dir"
            )
        return chosen

    def _objective(self, denoiser: nn.Module) -> Objective:
        train = self.recipe.train
        reference, without_adapters = None, None
        if train.kl_weight > 0:
            if self.recipe.model.lora is None:
                # Prepared as the policy is, so that both run in the same precision.
                frozen = copy.deepcopy(denoiser).requires_grad_(False)
                reference = self.accelerator.prepare_model(frozen, evaluation_mode=True)
            else:
                without_adapters = self._without_adapters
        extra = {} if without_adapters is None else {"without_adapters": without_adapters}
        return Objective(
            train.clip_range, train.advantage_clip, train.kl_weight, train.ratio_norm, reference=reference, **extra
        )

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        denoiser: Any = self.accelerator.unwrap_model(self.denoiser)
        denoiser.disable_adapters()
        try:
            yield
        finally:
            denoiser.enable_adapters()

    def _restore(self, folder: Path) -> dict[str, Any]:
        tensors, state = checkpoint.load(folder)
        ours = self._comparable(self.recipe.as_dict())
        theirs = self._comparable(state["recipe"])
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if different:
            raise ValueError(
                f"resume: {folder} was made with another recipe, different in {different}; want the same one"
            )
        parameters = {name: parameter for parameter, name in self.names.items()}
        if parameters.keys() != tensors["model"].keys():
            raise ValueError(f"resume: {folder} holds other parameters than this model trains")
        with torch.no_grad():
            for name, value in tensors["model"].items():
                parameters[name].copy_(value)
        checkpoint.restore_optimizer(self.optimizer, self.names, tensors.get("optimizer", {}))
        checkpoint.restore_rng(tensors["rng"])
        for name, now in (("threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if state[name] != now:
                warnings.warn(
                    f"resume: {folder} was made with {name} {state[name]}, this is {now}; "
                    "results can differ from an uninterrupted run in the last bits",
                    stacklevel=2,
                )
        return state

    @staticmethod
    def _comparable(recipe: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in recipe.items() if key not in FREE_ON_RESUME}
        kept["train"] = {key: value for key, value in recipe["train"].items() if key != "iterations"}
        return kept

    def _save(self, iteration: int) -> None:
        tensors: dict[str, dict[str, Tensor]] = {
            "model": {name: parameter for parameter, name in self.names.items()},
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, self.names),
            "rng": checkpoint.rng_tensors(),
        }
        state = {
            "recipe": self.recipe.as_dict(),
            "prompts_seen": iteration * self.recipe.train.prompts_per_iteration,
            "rows_are_equal": self.policy.rows_are_equal,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        checkpoint.save(self.directory.checkpoints, iteration, tensors, state)
        checkpoint.prune(self.directory.checkpoints, self.recipe.keep_checkpoints)

    def run(self) -> None:
        """Trains to the last iteration, evaluating and saving on the way."""
        train = self.recipe.train
        packing = "are filled without gaps" if self.policy.rows_are_equal else "keep every sample in its row"
        print(
            f"{self.recipe.name}: {len(self.names)} trained tensors, {self.steps_per_sample} of {len(self.table)} "
            f"steps a sample, model calls of {self.policy.rows} rows, which {packing} in the replay",
            flush=True,
        )
        if self.start == 0:
            self._evaluate(0)
        began = time.perf_counter()
        for iteration in range(self.start + 1, train.iterations + 1):
            row = self.iteration(iteration)
            self.directory.append(self.directory.metrics, row)
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=iteration)
            done = iteration - self.start
            left = (time.perf_counter() - began) / done * (train.iterations - iteration)
            print(progress_line(row, train.iterations, left), flush=True)
            if self.recipe.evaluation and (
                iteration % self.recipe.evaluation.every == 0 or iteration == train.iterations
            ):
                self._evaluate(iteration)
            if iteration % self.recipe.checkpoint_every == 0 or iteration == train.iterations:
                self._save(iteration)
        self.model.save(self.accelerator.unwrap_model(self.denoiser), self.directory.root / "model")
        self.accelerator.end_training()

    def _evaluate(self, iteration: int) -> None:
        if self.evaluator is None:
            return
        for sampler in ("ode", "sde"):
            result = self.evaluator(self.policy, sampler)
            row = {"iteration": iteration, "sampler": sampler, "diversity": result.diversity, **result.scores}
            self.directory.append(self.directory.evaluations, row)
            save_samples(self.directory.root / "samples", iteration, sampler, result.grid)
            scores = "  ".join(f"{name} {value:.3f}" for name, value in result.scores.items())
            print(f"evaluation {iteration} ({sampler.upper()}): {scores}  diversity {result.diversity:.3f}", flush=True)

    def iteration(self, iteration: int) -> dict[str, Any]:
        """One rollout and its updates; returns the row of `metrics.jsonl`."""
        train, seed = self.recipe.train, self.recipe.seed
        clock = [time.perf_counter()]
        prompts = prompts_of_iteration(self.prompts, train.prompts_per_iteration, iteration - 1, seed)
        data, frames = self._sample(iteration, prompts)
        clock.append(time.perf_counter())
        repeated = [prompt for prompt in prompts for _ in range(train.group_size)]
        rewards = phase("rewards")(self.rewards)(
            RewardInput(
                frames=frames,
                prompts=[prompt.text for prompt in repeated],
                group=torch.arange(len(prompts)).repeat_interleave(train.group_size),
                meta=[prompt.meta for prompt in repeated],
                fps=self.recipe.sampler.fps,
            )
        )
        clock.append(time.perf_counter())
        advantages = group_advantages(rewards, train.group_size, weights=self.rewards.weights)
        tally = self._update(iteration, data, advantages)
        row = self._row(iteration, rewards, advantages, tally)
        clock.append(time.perf_counter())
        row["seconds"] = dict(zip(("sample", "reward", "train"), _differences(clock), strict=True))
        return row

    def _sample(self, iteration: int, prompts: Sequence[Prompt]) -> tuple[dict[str, Any], Tensor]:
        train, sampler, seed = self.recipe.train, self.recipe.sampler, self.recipe.seed
        batch = len(prompts) * train.group_size
        ids = torch.arange(batch, device=self.device) + (iteration - 1) * batch
        conditioning = phase("text encoding")(self.model.encode)(prompts)
        starts = ids[:: train.group_size] if sampler.shared_noise else ids
        noise = gaussian_noise(
            self.model.latent_shape,
            seed=derive_seed(seed, "initial latents"),
            sample_ids=starts,
            dtype=sampler.torch_dtype(),
        )
        trajectory = phase("rollout")(rollout)(
            self.policy,
            self.table,
            noise,
            train.group_size,
            conditioning,
            seed=derive_seed(seed, "steps"),
            sample_ids=ids,
            shared_first_step=sampler.shared_noise,
            keep_outputs=train.ratio_norm,
        )
        steps = []
        for sample in range((iteration - 1) * batch, iteration * batch):
            order = torch.randperm(len(self.trainable_steps), generator=generator(seed, "timesteps", sample))
            steps.append([self.trainable_steps[i] for i in order[: self.steps_per_sample].tolist()])
        data = {"trajectory": trajectory, "conditioning": conditioning, "steps": steps}
        return data, phase("decode")(decode)(self.model, trajectory.denoised, train.micro_batch)

    def _update(self, iteration: int, data: dict[str, Any], advantages: Tensor) -> Tally:
        train = self.recipe.train
        experience = Experience(
            advantages=advantages.to(self.device),
            advantages_host=advantages.tolist(),
            group_size=train.group_size,
            shared_first_step=self.recipe.sampler.shared_noise,
            **data,
        )
        samples = list(range(len(advantages)))
        if train.best_of_n is not None:
            samples = best_and_worst(advantages, train.group_size, train.best_of_n).tolist()
        tally = Tally()
        first = True
        for epoch in range(train.inner_epochs):
            order = torch.randperm(len(samples), generator=generator(self.recipe.seed, "updates", iteration, epoch))
            # Every update gets an even share of each row of the micro-batch, so that no row waits for another.
            dealt = sorted((samples[i] for i in order.tolist()), key=lambda sample: sample % train.micro_batch)
            for update in range(train.updates_per_rollout):
                chosen = sorted(dealt[update :: train.updates_per_rollout])
                changed = phase("replay forward")(backward_update)(
                    self.policy,
                    self.denoiser,
                    self.table,
                    experience,
                    chosen,
                    self.objective,
                    self.accelerator.backward,
                    tally,
                    first,
                )
                if not changed:
                    # Skipping work must not skip the optimiser: its momentum moves on with a gradient of zero.
                    for parameter in self.names:
                        parameter.grad = torch.zeros_like(parameter)
                with phase("optimizer"):
                    tally.grad_norms.append(self.accelerator.clip_grad_norm_(list(self.names), train.max_grad_norm))
                    self.prepared_optimizer.step()
                    self.prepared_optimizer.zero_grad(set_to_none=True)
                first = False
        return tally

    def _row(self, iteration: int, rewards: Tensor, advantages: Tensor, tally: Tally) -> dict[str, Any]:
        groups = rewards.reshape(len(rewards), -1, self.recipe.train.group_size)
        constant = (groups.amax(dim=-1) == groups.amin(dim=-1)).all(dim=0)
        row: dict[str, Any] = {"iteration": iteration}
        for name, values in zip(self.rewards.names, rewards, strict=True):
            row[f"reward/{name}"] = float(values.mean())
            row[f"reward_std/{name}"] = float(values.std())
        row["zero_std_groups"] = int(constant.sum())
        row["advantage_max"] = float(advantages.abs().max())
        norms = torch.stack([torch.as_tensor(norm) for norm in tally.grad_norms]).tolist()
        row["grad_norm"] = sum(norms) / len(norms)
        if not all(math.isfinite(norm) for norm in norms):
            raise RuntimeError(f"iteration {iteration}: the gradient norm is {norms}, want finite numbers")
        if tally.sums is not None and tally.max_dev is not None:
            # The one read of an iteration's metrics. Without a sample in the first update, nothing was on policy.
            first = tally.max_dev * math.nan if tally.first_max_dev is None else tally.first_max_dev
            host = torch.cat([tally.sums, torch.stack([tally.max_dev, first])]).tolist()
            sums = dict(zip(PolicyMetrics._fields, host, strict=False))
            row["pairs"] = int(sums["samples"])
            for name in PolicyMetrics._fields[1:]:
                if name != "ratio_max_dev" and (name != "reference_kl" or self.objective.kl_weight > 0):
                    row[name] = sums[name] / sums["samples"]
            row["ratio_max_dev"] = host[-2]
            if tally.first_max_dev is not None:
                row["ratio_first_update_max_dev"] = host[-1]
                if host[-1] != 0.0:
                    warnings.warn(
                        f"iteration {iteration}: the first update's ratio is {host[-1]:.1e} away from 1; "
                        "the model does not repeat its own bits between rollout and replay",
                        stacklevel=2,
                    )
        row["skipped"] = dict(tally.counts)
        return row


def _differences(clock: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(clock)]
