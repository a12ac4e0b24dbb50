"""`train:` of a recipe."""

from dataclasses import dataclass, field
from typing import Literal

from .checks import at_least, positive


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
        best_of_n: train on the k best and k worst of each group; null: on all.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to it.
        clip_range: of the ratio: a number, or how far below and above 1 it may lie (DAPO's clip-higher).
        advantage_clip: largest absolute advantage.
        kl_weight: of the KL to the model as it starts.
        ratio_norm: GRPO-Guard's RatioNorm.
        mixed_precision: autocast of the denoiser; under FSDP2 its parameters are also gathered in it.
        gradient_sync: when processes reduce gradients: once an "update", or after every model "call", which under FSDP2
            keeps gradients in shards throughout.
        rollout_replica: under FSDP2, gather each parameter once a rollout and keep it, in the precision of the forward,
            until the samples are drawn. Samples are the same.
        ema_decay: of an exponential moving average of the trained parameters over updates, which is evaluated and saved
            beside them; null: none.
        offload: what waits in host memory while it does not run: "denoiser" (in one process), "vae", "rewards", and
            "block_inputs" of blocks that are checkpointed, until their backward.
    """

    iterations: int
    prompts_per_iteration: int
    group_size: int
    micro_batch: int
    timestep_fraction: float = 0.6
    updates_per_rollout: int = 1
    inner_epochs: int = 1
    best_of_n: int | None = None
    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    clip_range: float | tuple[float, float] = 1e-4
    advantage_clip: float = 5.0
    kl_weight: float = 0.0
    ratio_norm: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_sync: Literal["update", "call"] = "update"
    rollout_replica: bool = False
    ema_decay: float | None = None
    offload: list[Literal["denoiser", "vae", "rewards", "block_inputs"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("iterations", "prompts_per_iteration", "micro_batch", "updates_per_rollout", "inner_epochs"):
            at_least(f"train.{name}", getattr(self, name), 1)
        at_least("train.group_size", self.group_size, 2)
        for name in ("learning_rate", "max_grad_norm", "advantage_clip"):
            positive(f"train.{name}", getattr(self, name))
        for bound in self.clip_range if isinstance(self.clip_range, (tuple, list)) else (self.clip_range,):
            positive("train.clip_range", bound)
        for name in ("weight_decay", "kl_weight"):
            at_least(f"train.{name}", getattr(self, name), 0)
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"train.timestep_fraction: got {self.timestep_fraction}, want more than 0, at most 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"train.ema_decay: got {self.ema_decay}, want more than 0, less than 1")
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
