"""The loop: prompts, rollout, rewards, advantages, updates, checkpoint."""

import copy
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replacing, write_text
from ..marks import phase
from ..models import load_model
from ..processes import Processes, like, whole
from ..prompts import load_prompts, prompts_of_iteration, prompts_of_run
from ..recipe import Recipe
from ..rewards import RewardSet
from ..rng import derive_seed, generator
from ..run import checkpoint
from ..run.folder import RunDirectory
from ..run.identity import check_model, check_run, model_identity, run_identity
from ..run.sheets import save_samples
from ..run.words import progress_line
from .collect import Batch, Clock, Sampler
from .draw import Policy, rows_are_equal
from .ema import MovingAverage
from .held_out import Evaluator
from .metrics import metrics_row
from .residence import Residence
from .update import Objective, Tally, backward_update, plan_update


class Trainer:
    """One GRPO run of a recipe, in one of several processes or alone.

    Args:
        recipe: the run.
        resume: "auto" continues from the newest checkpoint of the output directory (or starts, where there is none), a
            path continues from that one, None starts anew and refuses a directory that already holds a run.

    Attributes:
        processes: of the run; `accelerator` is theirs and `device` this one's.
        reached: the prompts that training comes to, of all `prompts`; only these are encoded, and evaluation's.
        denoiser: as the update calls it. `model.denoiser` is what is inside.
        names: the trained parameters' names.

    Raises:
        ValueError: a recipe that cannot be run, a damaged or foreign checkpoint, an output directory in use.
    """

    def __init__(self, recipe: Recipe, resume: str | None = None) -> None:
        self.recipe = recipe
        train, evaluation = recipe.train, recipe.evaluation
        self.directory = RunDirectory(Path(recipe.output_dir or f"runs/{recipe.name}"))
        self.processes = Processes(train.mixed_precision, self.directory.root)
        self.accelerator, self.device = self.processes.accelerator, self.processes.device
        torch.set_num_threads(recipe.threads or self.processes.threads())
        found = self._find_checkpoint(resume)
        if train.rollout_replica and not self.processes.sharded:
            raise ValueError(f"train.rollout_replica: got true in {self.processes.name}, want FSDP2, or false")
        if recipe.model.quantization is not None and self.processes.sharded:
            raise ValueError(f'model.quantization: got "{recipe.model.quantization}" under FSDP2, want null')
        if "denoiser" in train.offload and self.processes.count > 1:
            raise ValueError(f'train.offload: got "denoiser" in {self.processes.name}, want one process')

        self.prompts = load_prompts(recipe.prompts)
        evaluated = [] if evaluation is None else self.prompts
        if evaluation is not None and evaluation.prompts is not None:
            evaluated = load_prompts(evaluation.prompts, "test")
        self._identity = run_identity(recipe, self.prompts, evaluated)
        if found is not None:
            check_run(found, checkpoint.load_state(found), self._identity)
        rewards = RewardSet(recipe.rewards)
        rewards.check(self.prompts)
        if "rewards" in train.offload:
            # The text encoders are loaded next.
            rewards.to("cpu")
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        if evaluation is not None and evaluation.samples_per_prompt < 2:
            raise ValueError("evaluation.samples_per_prompt: got 1, want at least 2 in training, for the diversity")
        self.reached = prompts_of_run(self.prompts, train.prompts_per_iteration, train.iterations, recipe.seed)
        prompts, reached = [*self.prompts, *evaluated], [*self.reached, *evaluated]
        self.model = load_model(recipe, self.device, prompts, reached=reached)
        denoiser = self.model.denoiser.eval()
        self.table = self.model.table(recipe.sampler)
        self.trainable_steps = [t for t in range(len(self.table) - 1) if self.table.tau[t] > 0]
        self._identity["model"] = model_identity(self.model)
        self.residence = Residence(train.offload, self.model, self.device)
        self.residence.add(rewards)
        self.evaluator = None
        if evaluation is not None:
            self.evaluator = Evaluator(
                evaluation, recipe.sampler, evaluated, self.model, recipe.seed, self.device, self.residence
            )
            self.evaluator.rewards.check(evaluated)
        self.sampler = Sampler(
            recipe, self.model, self.table, self.trainable_steps, rewards, self.processes, self.residence
        )
        self.rewards = rewards
        self.residence.use("denoiser")

        self.objective = self._objective(denoiser)
        self.model.denoiser = self.processes.prepare(denoiser)
        self.denoiser = self.processes.wrap(self.model.denoiser)
        self.names = {p: name for name, p in self.model.denoiser.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.names),
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.average = None if train.ema_decay is None else MovingAverage(self.names, train.ema_decay)
        state = {} if found is None else self._restore(found)
        self.start = int(state.get("iteration", 0))
        self.policy = self._policy(state.get("rows_are_equal"))
        if self.processes.is_main:
            self.directory.keep_until(self.start if found else -1)
            self.directory.root.mkdir(parents=True, exist_ok=True)
            write_text(self.directory.root / "recipe.json", json.dumps(recipe.as_dict(), indent=1))
        self.accelerator.init_trackers("tensorboard")

    def _find_checkpoint(self, resume: str | None) -> Path | None:
        found = self.directory.find_checkpoint(resume)
        everywhere = set(self.processes.collect([str(found)]))
        if len(everywhere) > 1:
            raise ValueError(f"resume: processes found {sorted(everywhere)}, want one, in an output_dir that all share")
        return found

    def _policy(self, equal: bool | None) -> Policy:
        train, scale = self.recipe.train, self.recipe.sampler.guidance_scale
        policy = Policy(self.model, train.micro_batch, scale, self.model.unconditional(scale))
        if equal is None:
            conditioning = self.residence.encode(self.reached[: train.micro_batch])
            self.residence.use("denoiser")
            with self.processes.sampling(self.model.denoiser, resident=False):
                ours = rows_are_equal(policy, self.table, conditioning)
            equal = all(self.processes.collect([ours]))
        return replace(policy, rows_are_equal=equal)

    def _objective(self, denoiser: nn.Module) -> Objective:
        train = self.recipe.train
        reference, without_adapters = None, None
        if train.kl_weight > 0:
            if self.recipe.model.lora is None:
                # Prepared as the policy is, so that both run in the same precision.
                frozen = copy.deepcopy(denoiser).requires_grad_(False)
                reference = self.processes.prepare(frozen)
            else:
                without_adapters = self._without_adapters
        extra = {} if without_adapters is None else {"without_adapters": without_adapters}
        return Objective(
            train.clip_range, train.advantage_clip, train.kl_weight, train.ratio_norm, reference=reference, **extra
        )

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        denoiser: Any = self.model.denoiser
        denoiser.disable_adapters()
        try:
            yield
        finally:
            denoiser.enable_adapters()

    def _restore(self, folder: Path) -> dict[str, Any]:
        tensors, state = checkpoint.load(folder)
        check_model(folder, state, self._identity)
        parameters = {name: parameter for parameter, name in self.names.items()}
        if parameters.keys() != tensors["model"].keys():
            raise ValueError(f"resume: {folder} holds other parameters than this model trains")
        with torch.no_grad():
            for name, value in tensors["model"].items():
                parameters[name].copy_(like(value, parameters[name]))
        if self.average is not None:
            self.average.load(tensors.get("ema", {}))
        checkpoint.restore_optimizer(self.optimizer, self.names, tensors.get("optimizer", {}))
        checkpoint.restore_rng(tensors["rng"])
        for name, now in self._surroundings().items():
            if state.get(name) != now and self.processes.is_main:
                warnings.warn(
                    f"resume: {folder} was made with {name} {state.get(name)}, this is {now}; "
                    "results can differ from an uninterrupted run in the last bits",
                    stacklevel=2,
                )
        return state

    def _surroundings(self) -> dict[str, Any]:
        """What may differ in a continuation, with a warning."""
        on_gpu = self.device.type == "cuda"
        return {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "processes": self.processes.name,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
        }

    def _save(self, iteration: int) -> None:
        full = self.processes.full
        groups: dict[str, dict[str, Tensor]] = {
            "model": {name: parameter for parameter, name in self.names.items()},
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, self.names),
        }
        if self.average is not None:
            groups["ema"] = self.average.values
        tensors: dict[str, dict[str, Tensor]] = {}
        for group, values in groups.items():
            wholes = {name: full(value) for name, value in values.items()}
            tensors[group] = {name: value for name, value in wholes.items() if value is not None}
        if not self.processes.is_main:
            return
        tensors["rng"] = checkpoint.rng_tensors()
        state = {
            **self._identity,
            **self._surroundings(),
            "prompts_seen": iteration * self.recipe.train.prompts_per_iteration,
            "rows_are_equal": self.policy.rows_are_equal,
        }
        checkpoint.save(self.directory.checkpoints, iteration, tensors, state)
        checkpoint.prune(self.directory.checkpoints, self.recipe.keep_checkpoints)

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)

    def run(self) -> None:
        """Trains to the last iteration, evaluating and saving on the way."""
        train, recipe = self.recipe.train, self.recipe
        packing = "are filled without gaps" if self.policy.rows_are_equal else "keep every sample in its row"
        self._say(
            f"{recipe.name}: {len(self.names)} trained tensors, {self.sampler.steps_per_sample} of {len(self.table)} "
            f"steps a sample, model calls of {self.policy.rows} rows, which {packing} in the replay, "
            f"{self.processes.name}"
        )
        if self.start == train.iterations:
            self._say(f"{recipe.name}: all {self.start} iterations are done, for more raise train.iterations")
        if self.start == 0:
            self._evaluate(0)
        began = time.perf_counter()
        for iteration in range(self.start + 1, train.iterations + 1):
            row = self.iteration(iteration)
            if self.processes.is_main:
                self.directory.append(self.directory.metrics, row)
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=iteration)
            done = iteration - self.start
            left = (time.perf_counter() - began) / done * (train.iterations - iteration)
            self._say(progress_line(row, train.iterations, left))
            last = iteration == train.iterations
            if recipe.evaluation and (last or iteration % recipe.evaluation.every == 0):
                self._evaluate(iteration)
            if last or iteration % recipe.checkpoint_every == 0:
                self._save(iteration)
        self._save_model("model")
        if self.average is not None:
            with self.average.applied():
                self._save_model("model_ema")
        # A group that a process leaves is of no use to one that still has something to gather.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _save_model(self, name: str) -> None:
        with self.processes.whole(self.model.denoiser) as denoiser:
            if denoiser is not None:
                size = sum(parameter.nbytes for parameter in self.names)
                with replacing(self.directory.root / name, size) as folder:
                    self.model.save(denoiser, folder)

    def _evaluate(self, iteration: int) -> None:
        if self.evaluator is None:
            return
        for sampler in ("ode", "sde"):
            with (
                nullcontext() if self.average is None else self.average.applied(),
                self.processes.sampling(self.model.denoiser, self.recipe.train.rollout_replica),
            ):
                result = self.evaluator(self.policy, sampler, self.processes)
            if self.processes.is_main:
                row = {"iteration": iteration, "sampler": sampler, "diversity": result.diversity, **result.scores}
                self.directory.append(self.directory.evaluations, row)
                shown = [prompt.text for prompt in self.evaluator.prompts[: len(result.grid)]]
                folder, fps = self.directory.root / "samples", self.recipe.sampler.fps
                save_samples(folder, iteration, sampler, result.grid, shown, fps)
            scores = "  ".join(f"{name} {value:.3f}" for name, value in result.scores.items())
            self._say(f"evaluation {iteration} ({sampler.upper()}): {scores}  diversity {result.diversity:.3f}")

    def iteration(self, iteration: int) -> dict[str, Any]:
        """One rollout and its updates; returns the row of `metrics.jsonl`, the same in every process."""
        train = self.recipe.train
        prompts = prompts_of_iteration(self.prompts, train.prompts_per_iteration, iteration - 1, self.recipe.seed)
        batch = self.sampler(self.policy, iteration, prompts)
        clock = Clock()
        tally = self._update(iteration, batch)
        row = metrics_row(
            iteration,
            self.rewards.names,
            batch.rewards,
            batch.advantages,
            train.group_size,
            tally,
            self.processes,
            with_kl=self.objective.kl_weight > 0,
        )
        clock.stop("train")
        row["seconds"] = batch.seconds | clock.seconds
        return row

    def _update(self, iteration: int, batch: Batch) -> Tally:
        train, tally = self.recipe.train, Tally()
        place = {sample: here for here, sample in enumerate(batch.kept)}
        updates = []
        for epoch in range(train.inner_epochs):
            for chosen in self._deal(batch.chosen, iteration, epoch):
                ours = [place[sample] for sample in chosen if sample in place]
                updates.append(plan_update(self.policy, batch.data, ours, self.objective, len(chosen), tally))
        # Where calls gather parameters or reduce gradients, every process makes as many as the one that needs most;
        # where only the last one reduces, at least that one.
        every = train.gradient_sync == "call"
        own = torch.tensor([update.calls for update in updates])
        most = self.processes.max(own).cpu()
        calls = most if every or self.processes.sharded else torch.maximum(own, most.clamp(max=1))
        for number, (update, count) in enumerate(zip(updates, calls.tolist(), strict=True)):
            changed = phase("replay forward")(backward_update)(
                self.policy,
                self.denoiser,
                self.table,
                batch.data,
                update,
                self.objective,
                self.processes,
                count,
                tally,
                number == 0,
                each_call=every,
            )
            with phase("optimizer"):
                self._step(changed, tally)
        return tally

    def _step(self, changed: bool, tally: Tally) -> None:
        if not changed:
            # Skipping work must not skip the optimiser: its momentum moves on with a gradient of zero.
            for parameter in self.names:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(list(self.names), self.recipe.train.max_grad_norm)
        tally.grad_norms.append(whole(norm))
        self.optimizer.step()
        # DDP's gradients are its buckets, which stay.
        self.optimizer.zero_grad(set_to_none=self.denoiser is self.model.denoiser)
        if self.average is not None:
            self.average.update()

    def _deal(self, chosen: Sequence[int], iteration: int, epoch: int) -> list[list[int]]:
        """The samples of every update of an epoch; how many processes there are does not matter."""
        train = self.recipe.train
        updates, rows = train.updates_per_rollout, train.micro_batch
        random = generator(self.recipe.seed, "updates", iteration, epoch)
        if not self.policy.rows_are_equal:
            # An even share of each row of the micro-batch, so that no row waits for another.
            order = torch.randperm(len(chosen), generator=random).tolist()
            dealt = sorted((chosen[i] for i in order), key=lambda sample: sample % rows)
            return [sorted(dealt[update::updates]) for update in range(updates)]
        # One of each run of neighbours, so that no process waits for another, whichever neighbours it has.
        hands: list[list[int]] = [[] for _ in range(updates)]
        for first in range(0, len(chosen), updates):
            order = torch.randperm(updates, generator=random).tolist()
            for sample, update in zip(chosen[first : first + updates], order, strict=False):
                hands[update].append(sample)
        return hands
