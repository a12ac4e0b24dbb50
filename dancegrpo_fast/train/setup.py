"""What a run is made of: checked, built and restored, in the order in which it can fail cheaply."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from ..allocator import expand_segments
from ..checks import shown
from ..compiling import Compiled, check_compiler, compile_denoiser
from ..experts import trained
from ..files import write_text
from ..models import family_of, load_model
from ..optimizers import EIGHT_BIT, find_optimizer, probe
from ..processes import Processes
from ..prompts import Prompt, load_prompts, prompts_of_run
from ..recipe import Recipe
from ..rewards import RewardSet, check_reward
from ..rng import derive_seed
from ..run import checkpoint
from ..run.changes import ALL, read_accepted, within
from ..run.folder import RunDirectory
from ..run.identity import check_run, evaluation_differs, model_identity, run_identity
from ..stopping import Stop
from .calls import Policy, compile_calls, rows_are_equal
from .calls import probe as probe_inputs
from .collect import Collector
from .draw import shared_step
from .ema import MovingAverage
from .held_out import Evaluator
from .losses import check_steps, make_loss
from .one_pass import OnePass
from .optimizer import Optimizer
from .per_sample import PerSample
from .residence import Residence
from .speed import Speed, flops_of_a_row, peak_flops
from .state import State
from .tracking import Tracking, check_trackers
from .update import Updates

NOTICE = "samples are dropped, updates are finished, the last whole iteration is saved; another Ctrl-C stops at once"


class Setup:
    """A run of a recipe, ready to train, in one of several processes or alone.

    Args:
        recipe: the run.
        resume: "auto" continues from the newest checkpoint of the output directory (or starts, where there is none), a
            path continues from that one, None starts anew and refuses a directory that already holds a run.
        accept_changes: fields of the recipe, with commas between them, that may differ from those of the run that is
            continued, although its bits then differ from here on; "all"; or None.

    Attributes:
        directory: of its files.
        processes: of the run; `accelerator` is theirs and `device` this one's.
        prompts: of its file; training comes to those in `reached`, and only these are encoded, and evaluation's.
        model: the family; `model.denoiser` is what is trained.
        denoiser: the same as the update calls it.
        table: of the sampler.
        policy: the model as rollout and replay call it.
        parameters: that are trained, by name.
        stop: the signals that end it.
        rewards, evaluator, loss, collect, updates, optimizer, average, state, residence, speed: the parts of the loop.
        rows_are_equal: the model gives the same bits in whichever row of a call a sample sits.
        start: iterations that are done.
        finished: nothing is left to do: all iterations are done and their model is saved. The rest was not built.
        changes: what was accepted and does differ.
        notes: lines about the allocator, and about how the run is continued.

    Raises:
        ValueError: a recipe that cannot be run, a damaged or foreign checkpoint, an output directory in use.
    """

    def __init__(self, recipe: Recipe, resume: str | None = None, accept_changes: str | None = None) -> None:
        self.recipe, self.notes = recipe, list[str]()
        if accept_changes is not None and resume is None:
            raise ValueError(f"accept-changes: got {accept_changes} without --resume, want both")
        self.directory = RunDirectory(Path(recipe.output_dir or f"runs/{recipe.name}"))
        check_trackers(recipe.tracking)
        self.processes = Processes(
            recipe.train.mixed_precision, recipe.train.sequence_parallel, recipe.train.sequence_kind
        )
        self.accelerator, self.device = self.processes.accelerator, self.processes.device
        if told := expand_segments(self.device):
            self.notes.append(told)
        self.stop = Stop(
            largest=self.processes.largest,
            leaves=not self.processes.wait,
            notice=NOTICE if self.processes.is_main else None,
        )
        torch.set_num_threads(recipe.threads or self.processes.threads())
        found = self._find_checkpoint(resume)
        self._check()
        self.prompts, evaluated = self._read_prompts()
        identity = run_identity(recipe, self.prompts, evaluated)
        state = {} if found is None else checkpoint.load_state(found)
        accepted = read_accepted(accept_changes, identity["recipe"], state.get("recipe"))
        self.changes = [] if found is None else check_run(found, state, identity, accepted)
        self.start = int(state.get("iteration", 0))
        self.finished = self._is_finished()
        if self.finished:
            return
        self.rewards = RewardSet(recipe.rewards)
        self.rewards.check(self.prompts)
        if "rewards" in recipe.train.offload:
            # The text encoders are loaded next.
            self.rewards.to("cpu")
        self._load_model(evaluated)
        identity |= {"model": model_identity(self.model)}
        identity |= {"gradient_sync": self.model.gradient_sync, "passes": self.model.passes}
        self._build(evaluated, identity)
        if found is not None:
            self._restore(found, accepted)
        if self.model.compiled is not None:
            self._compile(self.model.compiled)
        known = "rows_are_equal" in state and not self.changes
        self.rows_are_equal = state["rows_are_equal"] if known else self._probe_rows()
        each_call = self.model.gradient_sync == "call"
        self.collect.recorder = one_pass = self._one_pass()
        self.updates = Updates(
            *(recipe, self.policy, self.denoiser, self.table, self.loss, self.processes, self.rows_are_equal),
            each_call,
            one_pass,
        )
        self.speed = self._measure()
        self._continue(found, state, identity)
        if self.processes.is_main:
            self.directory.root.mkdir(parents=True, exist_ok=True)
            write_text(self.directory.root / "recipe.json", json.dumps(recipe.as_dict(), indent=1))
        self.tracking = Tracking(recipe, self.directory.root, self.start, self.processes)

    def _find_checkpoint(self, resume: str | None) -> Path | None:
        for refused in self.processes.collect([self.directory.claim() if self.processes.is_main else None]):
            if refused is not None:
                raise ValueError(refused)
        found = self.directory.find_checkpoint(resume)
        everywhere = set(self.processes.collect([str(found)]))
        if len(everywhere) > 1:
            raise ValueError(f"resume: processes found {sorted(everywhere)}, want one, in an output_dir that all share")
        return found

    def _is_finished(self) -> bool:
        names = ["model", *([] if self.recipe.train.ema_decay is None else ["model_ema"])]
        saved = [self.directory.saved(name) for name in names]
        done = self.start == self.recipe.train.iterations and all(number == self.start for number in saved)
        return all(self.processes.collect([done]))

    def _restore(self, found: Path, accepted: list[str]) -> None:
        self.changes += self.state.restore(found, accepted, [change.field for change in self.changes])
        idle = [name for name in accepted if name != ALL and not any(within(one.field, name) for one in self.changes)]
        if idle:
            self.notes.append(f"accept-changes: {', '.join(idle)} did not change")

    def _continue(self, found: Path | None, state: dict[str, Any], identity: dict[str, Any]) -> None:
        """What is kept of the directory, and what the next checkpoints say of how the run came about."""
        own = found is not None and found.resolve().parent == self.directory.checkpoints.resolve()
        first = state.get("first_row", 1) if own else self.start + 1
        if self.processes.is_main:
            missing = self.directory.keep_until(self.start if found else -1, first)
            if missing:
                self.notes.append(
                    f"{self.directory.metrics} lacks the rows of {len(missing)} iterations, from {missing[0]} to "
                    f"{missing[-1]}; they are lost, the weights are as they were"
                )
        if found is not None and evaluation_differs(state, identity):
            self.notes.append(
                f"evaluation has other settings or prompts: rows up to iteration {self.start} are not comparable"
            )
        changes = [
            {"iteration": self.start, "field": one.field, "from": one.then, "to": one.now} for one in self.changes
        ]
        self.history = {"first_row": first, "changes": [*state.get("changes", []), *changes]}

    def _check(self) -> None:
        """Settings that these processes, or training, cannot have."""
        recipe, processes, train = self.recipe, self.processes, self.recipe.train
        optimizer = train.optimizer
        recipe.check_trained()
        find_optimizer(optimizer)
        if optimizer == EIGHT_BIT and self.device.type == "cpu":
            raise ValueError(f'train.optimizer: got "{optimizer}" on a CPU, want a GPU, or adamw')
        if (kept := probe(recipe.train)).others and processes.sharded:
            raise ValueError(f'train.optimizer: got "{optimizer}" under FSDP2, which cannot split its {kept.others[0]}')
        if recipe.model.compile is not None:
            if processes.sharded:
                raise ValueError(f'model.compile: got "{recipe.model.compile}" under FSDP2, want null')
            check_compiler(recipe.model.compile, self.device)
        if recipe.train.rollout_replica and not processes.sharded:
            raise ValueError(f"train.rollout_replica: got true in {processes.name}, want FSDP2, or false")
        if train.passes != 2 and processes.sharded:
            raise ValueError(
                f"train.passes: got {shown(train.passes)} under FSDP2, which frees weights after a call, want 2"
            )
        if train.overlap_rewards and processes.sharded:
            raise ValueError("train.overlap_rewards: got true under FSDP2, want false")
        if recipe.model.quantization is not None and processes.sharded:
            raise ValueError(f'model.quantization: got "{recipe.model.quantization}" under FSDP2, want null')
        if recipe.model.blocks_to_swap != 0 and processes.sharded:
            raise ValueError(f"model.blocks_to_swap: got {recipe.model.blocks_to_swap} under FSDP2, want 0")
        for what in {"denoiser", "expert"}.intersection(recipe.train.offload):
            if processes.count > 1:
                raise ValueError(f'train.offload: got "{what}" in {processes.name}, want one process')
        if recipe.evaluation is not None and recipe.evaluation.samples_per_prompt < 2:
            raise ValueError("evaluation.samples_per_prompt: got 1, want at least 2 in training, for the diversity")
        check_steps(recipe)
        family_of(recipe.model)
        for reward in recipe.evaluation.rewards if recipe.evaluation is not None else ():
            check_reward(reward)

    def _read_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Of training, and of evaluation."""
        prompts, evaluation = load_prompts(self.recipe.prompts), self.recipe.evaluation
        if evaluation is None:
            return prompts, []
        return prompts, prompts if evaluation.prompts is None else load_prompts(evaluation.prompts, "test")

    def _load_model(self, evaluated: list[Prompt]) -> None:
        recipe, train = self.recipe, self.recipe.train
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        self.reached = prompts_of_run(self.prompts, train.prompts_per_iteration, train.iterations, recipe.seed)
        prompts, reached = [*self.prompts, *evaluated], [*self.reached, *evaluated]
        self.model = load_model(recipe, self.device, prompts, reached=reached)
        self.model.denoiser.eval()
        self.model.compiled = None if recipe.model.compile is None else Compiled()
        self.policy = Policy.of(recipe, self.model)
        self.table = self.model.table(recipe.sampler)

    def _build(self, evaluated: list[Prompt], identity: dict[str, Any]) -> None:
        recipe, train, processes = self.recipe, self.recipe.train, self.processes
        self.residence = Residence(train.offload, self.model, self.device)
        self.residence.add(self.rewards)
        self.evaluator = None
        if recipe.evaluation is not None:
            self.evaluator = Evaluator(
                recipe, recipe.evaluation, evaluated, self.policy, processes, self.residence, self.stop
            )
            self.evaluator.rewards.check(evaluated)
        self.residence.use("denoiser")
        self.loss = make_loss(recipe, self.model.denoiser, self.table, self.model.turns(self.table), processes)
        self.collect = Collector(
            recipe, self.policy, self.table, self.rewards, processes, self.residence, self.loss.keeps_outputs, self.stop
        )
        self.model.denoiser = processes.prepare(self.model.denoiser)
        if recipe.model.compile is not None:
            compile_denoiser(self.model.denoiser, recipe.model.compile)
        # Where the rollout's calls have gradients, all of them are reduced by hand.
        self.denoiser = processes.wrap(self.model.denoiser) if self.model.passes == 2 else self.model.denoiser
        self.parameters = {name: p for name, p in self.model.denoiser.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(
            self.parameters,
            train,
            keep_gradients=self.denoiser is not self.model.denoiser,
            scaled=recipe.model.dtype == "float16",
        )
        self.average = (
            None if train.ema_decay is None else MovingAverage(self.parameters, self.optimizer.weights, train.ema_decay)
        )
        self.state = State(identity, processes, self.optimizer, self.average)

    def _compile(self, compiled: Compiled) -> None:
        """Compiles now what an iteration calls, so that what cannot be is said before the first."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        begin, what = time.perf_counter(), self.recipe.model.compile
        conditioning = self.residence.encode(self.reached[: self.policy.rows])
        self.residence.use("denoiser")
        try:
            equal = compile_calls(self.policy, self.table, conditioning)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            (found, *_) = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f'model.compile: got "{what}", which torch does not compile for this model: {found}'
            ) from error
        equal = all(self.processes.collect([equal]))
        compiled.with_gradients = not equal
        compiled.seconds = time.perf_counter() - begin
        how = "without gradients, which has the same bits" if equal else "of the replay, as one without has other bits"
        self.notes.append(f"compiled {what} in {compiled.seconds:.0f} s; rollout runs the forward {how}")

    def _measure(self) -> Speed:
        """Counts a model call where that is of use."""
        peak, row = peak_flops(self.recipe, self.device), None
        # Of nf4 and int8 weights torch sees some products only.
        if all(self.processes.collect([peak is not None])) and self.recipe.model.quantization not in ("nf4", "int8"):
            conditioning = self.residence.encode(self.reached[: self.policy.rows])
            self.residence.use("denoiser")
            with self.processes.sampling(self.model.denoiser, resident=False):
                row = flops_of_a_row(self.policy, self.table, conditioning)
        shared = shared_step(self.table) + 1 if self.recipe.sampler.shared_noise else 0
        whole = None if peak is None else peak * self.processes.groups
        return Speed(self.recipe, len(self.table), shared, row, whole)

    def _one_pass(self) -> OnePass | None:
        """What takes gradients in the rollout, tried on a model call."""
        kind, policy, per_sample = self.model.passes, self.policy, None
        if kind == 2:
            return None
        dropped = kind == "reweight" and self.recipe.train.best_of_n is not None
        more = ", of samples that best-of-N leaves out, too" if dropped else ""
        self.notes.append(f"one pass ({kind}): the rollout's own model calls have the gradients{more}")
        if kind == "reweight":
            per_sample = PerSample(self.model.denoiser, self.parameters, policy.rows)
            conditioning = self.residence.encode(self.reached[: policy.rows])
            self.residence.use("denoiser")
            for expert in range(len(trained(self.model.denoiser))):
                per_sample.check(policy, probe_inputs(policy, self.table, conditioning, expert))
        return OnePass(policy, self.loss, len(self.table), self.rows_are_equal, self.parameters, per_sample)

    def _probe_rows(self) -> bool:
        # From the shortest to the longest: rows of a call have text of unequal length.
        ordered = sorted(self.reached, key=lambda prompt: len(prompt.text))
        steps = max(1, self.policy.rows - 1)
        spread = [ordered[row * (len(ordered) - 1) // steps] for row in range(self.policy.rows)]
        conditioning = self.residence.encode(spread)
        self.residence.use("denoiser")
        with self.processes.sampling(self.model.denoiser, resident=False):
            ours = rows_are_equal(self.policy, self.table, conditioning)
        return all(self.processes.collect([ours]))
