"""`train:` of a recipe."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import shown
from .checks import at_least, check_fields, positive


@dataclass
class TrainSettings:
    """The optimisation.

    Args:
        iterations: rollouts.
        prompts_per_iteration: P.
        group_size: samples of each prompt, G.
        micro_batch: rows of every model call, in rollout and replay alike.
        timestep_fraction: share of the trainable steps that each sample is trained on, drawn at random per sample.
        updates_per_rollout: optimiser steps that share out a rollout's samples.
        inner_epochs: passes over a rollout.
        passes: through the model of each transition that is trained on. 2: the rollout's, and one that is replayed with
            gradients. With one update a rollout the rollout's own call can have them: "retain" keeps its graph until
            the advantages are known, "reweight" runs its backward at once into LoRA gradients of every sample apart,
            which the advantages weight. 1: which of these the planner finds to fit, or else 2.
        best_of_n: train on the k best and k worst of each group; null: on all.
        optimizer: "adamw", "adamw8bit" (bitsandbytes', on a GPU), or any torch optimiser as "module:Class".
        optimizer_args: its arguments beside the next two: betas, eps, and so on.
        learning_rate: of the optimiser, at its highest.
        warmup_updates: that the learning rate takes to rise from `learning_rate / warmup_updates` to `learning_rate`.
        schedule: "constant", or how the learning rate falls from there to 0 at the run's end: "linear", "cosine".
        weight_decay: of the optimiser.
        master_dtype: "float32": weights of all of a denoiser in fewer bits are trained as float32 copies, of which they
            are the rounding. null: there are none.
        max_grad_norm: gradients are scaled down to it.
        clip_range: of the ratio: a number, or how far below and above 1 it may lie (DAPO's clip-higher). null: 1e-4 as
            published, with `ratio_norm`, whose ratios lie closer to 1, GRPO-Guard's 2e-6.
        advantages: rewards less the mean of their group, divided by the standard deviation of the "group", or of all
            samples of the iteration, the "batch" (Flow-GRPO's `global_std`).
        divide_by_std: false only subtracts the mean (Dr. GRPO).
        advantage_std_floor: a smaller standard deviation counts as this: what differences of a reward mean nothing.
        advantage_clip: largest absolute advantage of each reward, before its weight.
        kl_weight: of the KL to the model as it starts, that of a step. Flow-GRPO's `beta`, whose KL lacks the step size
            -dt in the variance, is `kl_weight = beta (-dt)` here.
        ratio_norm: GRPO-Guard's RatioNorm.
        mixed_precision: autocast of the denoiser; under FSDP2 its parameters are also gathered in it.
        gradient_sync: when processes reduce gradients: once an "update", or after every model "call", which under FSDP2
            keeps gradients in shards throughout. "auto": once an update, but where that does not fit the memory.
        rollout_replica: under FSDP2, gather each parameter once a rollout and keep it, in the precision of the forward,
            until the samples are drawn. Samples are the same.
        sequence_parallel: how many processes share the tokens of a sample; the samples are dealt to groups of them.
        sequence_kind: how: "ulysses" changes tokens for heads around attention, "ring" hands keys and values round.
        ema_decay: of an exponential moving average of the trained parameters over updates, which is evaluated and saved
            beside them; null: none.
        overlap_rewards: score samples in a thread while the next ones are drawn, in sets that end where a group and a
            model call do.
        offload: what waits in host memory while it does not run: "denoiser" (in one process), "vae", "rewards",
            "block_inputs" of blocks that are checkpointed, until their backward, and "expert", under LoRA the frozen
            weights of that of two denoisers whose turn it is not (in one process).
    """

    iterations: int
    prompts_per_iteration: int
    group_size: int
    micro_batch: int
    timestep_fraction: float = 0.6
    updates_per_rollout: int = 1
    inner_epochs: int = 1
    passes: Literal[2, 1, "retain", "reweight"] = 2
    best_of_n: int | None = None
    optimizer: str = "adamw"
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-5
    warmup_updates: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 1e-4
    master_dtype: Literal["float32"] | None = None
    max_grad_norm: float = 1.0
    clip_range: float | tuple[float, float] | None = None
    advantages: Literal["group", "batch"] = "group"
    divide_by_std: bool = True
    advantage_std_floor: float = 0.0
    advantage_clip: float = 5.0
    kl_weight: float = 0.0
    ratio_norm: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_sync: Literal["auto", "update", "call"] = "update"
    rollout_replica: bool = False
    sequence_parallel: int = 1
    sequence_kind: Literal["ulysses", "ring"] = "ulysses"
    ema_decay: float | None = None
    overlap_rewards: bool = False
    offload: list[Literal["denoiser", "vae", "rewards", "block_inputs", "expert"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields("train", self)
        for name in ("iterations", "prompts_per_iteration", "micro_batch", "updates_per_rollout", "inner_epochs"):
            at_least(f"train.{name}", getattr(self, name), 1)
        at_least("train.sequence_parallel", self.sequence_parallel, 1)
        at_least("train.group_size", self.group_size, 2)
        for name in ("learning_rate", "max_grad_norm", "advantage_clip"):
            positive(f"train.{name}", getattr(self, name))
        clip = self.ratio_clip()
        for bound in clip if isinstance(clip, (tuple, list)) else (clip,):
            positive("train.clip_range", bound)
        for name in ("weight_decay", "kl_weight", "warmup_updates", "advantage_std_floor"):
            at_least(f"train.{name}", getattr(self, name), 0)
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"train.timestep_fraction: got {self.timestep_fraction}, want more than 0, at most 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"train.ema_decay: got {self.ema_decay}, want more than 0, less than 1")
        self._check_passes()
        self._check_overlap()
        if self.optimizer not in ("adamw", "adamw8bit") and not all(self.optimizer.partition(":")):
            raise ValueError(f'train.optimizer: got "{self.optimizer}", want adamw, adamw8bit or module:Class')
        for name, where in (("lr", "learning_rate"), ("weight_decay", "weight_decay"), ("params", "nothing")):
            if name in self.optimizer_args:
                raise ValueError(f"train.optimizer_args: got {name}, want train.{where} for it")
        batch = self.prompts_per_iteration * self.group_size
        if self.micro_batch > batch:
            raise ValueError(
                f"train.micro_batch: got {self.micro_batch}, want at most the {batch} samples of a rollout"
            )
        if self.best_of_n is not None and not 1 <= 2 * self.best_of_n <= self.group_size:
            raise ValueError(f"train.best_of_n: got {self.best_of_n}, want 1 to {self.group_size // 2}")
        kept = batch if self.best_of_n is None else self.prompts_per_iteration * 2 * self.best_of_n
        if self.updates_per_rollout > kept:
            raise ValueError(f"train.updates_per_rollout: got {self.updates_per_rollout}, want at most {kept} samples")
        if self.warmup_updates >= self.updates:
            raise ValueError(
                f"train.warmup_updates: got {self.warmup_updates}, want less than the run's {self.updates} updates"
            )

    def _check_passes(self) -> None:
        if self.passes == 2:
            return
        # Only of the first update after a rollout is the ratio 1.
        for name in ("updates_per_rollout", "inner_epochs", "sequence_parallel"):
            if getattr(self, name) != 1:
                raise ValueError(f"train.passes: got {shown(self.passes)} with {name} {getattr(self, name)}, want 2")
        if self.gradient_sync == "call":
            raise ValueError(f'train.passes: got {shown(self.passes)} with gradient_sync "call", want "update"')
        if self.passes == "reweight" and self.kl_weight > 0:
            raise ValueError(
                f'train.passes: got "reweight" with kl_weight {self.kl_weight}, whose gradient has other weights and '
                'takes a backward of its own, want 2 or "retain"'
            )

    def _check_overlap(self) -> None:
        if not self.overlap_rewards:
            return
        if self.passes != 2:
            raise ValueError(
                f"train.overlap_rewards: got true with passes {shown(self.passes)}, whose calls are dealt for all "
                "samples at once, want one of them"
            )
        if self.sequence_parallel != 1:
            raise ValueError(f"train.overlap_rewards: got true with sequence_parallel {self.sequence_parallel}, want 1")
        for what in ("denoiser", "vae", "rewards"):
            if what in self.offload:
                raise ValueError(f'train.overlap_rewards: got true with offload "{what}", which runs alone, want false')

    @property
    def updates_per_iteration(self) -> int:
        """Of all passes over a rollout."""
        return self.updates_per_rollout * self.inner_epochs

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return self.iterations * self.updates_per_iteration

    def ratio_clip(self) -> float | tuple[float, float]:
        """`clip_range`, or what it is where it is null."""
        if self.clip_range is not None:
            return self.clip_range
        return 2e-6 if self.ratio_norm else 1e-4

    def normalisation(self) -> dict[str, Any]:
        """What `group_advantages` does with the deviations."""
        return {
            "std_of": self.advantages,
            "divide_by_std": self.divide_by_std,
            "std_floor": self.advantage_std_floor,
        }
