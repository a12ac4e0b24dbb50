"""A run as dataclasses: recipes are YAML files of these, and every field can be overridden on the command line."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .prompts import check_text


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: got {value}, want more than 0")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{name}: got {value}, want at least {low:g}")


@dataclass
class LoraSettings:
    """peft LoRA on the denoiser.

    Args:
        rank: of the update matrices.
        alpha: its scale is `alpha / rank`.
        target_modules: endings of the module names that get one.
    """

    rank: int = 32
    alpha: int = 32
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self) -> None:
        _positive("model.lora.rank", self.rank)
        _positive("model.lora.alpha", self.alpha)


@dataclass
class ModelSettings:
    """The generator.

    Args:
        family: "flux", "stable_diffusion", "hunyuan_video", "skyreels_i2v", "sd3", "qwen_image" or "wan".
        path: a diffusers folder, or a name on the hub.
        dtype: of the denoiser's weights.
        denoiser: where the denoiser is instead, a folder or a name on the hub: in its `transformer/` or `unet/`, or
            directly in it; null: in `path`.
        frozen_dtype: of the VAE's and the text encoders' weights; null: as `dtype`.
        lora: train LoRA layers instead of the whole denoiser.
        checkpointing: what the backward recomputes: "none", "full", "attention", "matmul", "first:K" (the first K
            blocks), or "auto": as little as `memory_gib` allows.
        memory_gib: what "auto" may use; null: the device's memory.
        block_ops: put the block ops into the denoiser, "lossless" or "fast" (`dancegrpo_fast.accelerate`).
        on_mismatch: "warn", or "eager" to compute by eager torch what "lossless" block ops compute otherwise on this
            GPU.
        attention: a diffusers attention backend by name, or "auto" (`dancegrpo_fast.attention.choice.choose`); null
            leaves the model as it is.
        vae_tiling: decode in tiles: "on", "off", or "auto", where a whole decode would not fit `memory_gib`.
        prompt_cache: folder of prompt embeddings, made once per model and prompt; text encoders are freed afterwards.
        max_text_tokens: of a prompt, where the family has a choice; null: its pipeline's own.
        quantization: how frozen bfloat16 weights under LoRA are stored: "nf4" or "int8" (bitsandbytes', on a GPU; a
            row's result depends on no other row), "fp8" (cast while their layer runs, and kept so for its backward in
            blocks that are not checkpointed); null: as they are.
    """

    family: str
    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    denoiser: str | None = None
    frozen_dtype: Literal["float32", "bfloat16"] | None = None
    lora: LoraSettings | None = None
    checkpointing: str = "none"
    memory_gib: float | None = None
    block_ops: Literal["off", "lossless", "fast"] = "off"
    on_mismatch: Literal["warn", "eager"] = "warn"
    attention: str | None = None
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    prompt_cache: str = "runs/prompt_cache"
    max_text_tokens: int | None = None
    quantization: Literal["nf4", "int8", "fp8"] | None = None

    def __post_init__(self) -> None:
        known = ("none", "full", "attention", "matmul", "auto")
        first, _, count = self.checkpointing.partition(":")
        if self.checkpointing not in known and not (first == "first" and count.isdigit() and int(count) > 0):
            raise ValueError(f'model.checkpointing: got "{self.checkpointing}", want one of {known} or "first:K"')
        for name in ("memory_gib", "max_text_tokens"):
            value = getattr(self, name)
            if value is not None:
                _positive(f"model.{name}", value)
        if self.on_mismatch == "eager" and self.block_ops != "lossless":
            raise ValueError(f'model.on_mismatch: got "eager" with block_ops "{self.block_ops}", want "lossless"')
        if self.quantization is not None and self.lora is None:
            raise ValueError(f'model.quantization: got "{self.quantization}" without model.lora, want both, or null')
        if self.quantization is not None and self.dtype != "bfloat16":
            raise ValueError(f'model.quantization: got "{self.quantization}" with {self.dtype}, want bfloat16, or null')

    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def frozen_torch_dtype(self) -> torch.dtype:
        """`frozen_dtype` as torch names it."""
        return torch.bfloat16 if (self.frozen_dtype or self.dtype) == "bfloat16" else torch.float32


@dataclass
class SamplerSettings:
    """How samples are drawn in the rollout, and again in the replay.

    Args:
        kind: "dance_sde", "flow_sde", "cps" or "ode" for flows, "ddim" or "vp_sde" for diffusion.
        num_steps: T.
        eta: noise level of the sampler.
        shift: of the flow's schedule; null takes the scheduler's own.
        guidance_scale: classifier-free guidance, or the guidance embedding where the model has one; 1 is off.
        height: of the images, in pixels.
        width: of the images, in pixels.
        frames: of a video, in the pixels of its VAE; 1 is an image.
        fps: frames per second, which rewards of videos need.
        negative_prompt: what classifier-free guidance leads away from.
        shared_noise: all samples of a prompt start from the same noise, and step 0 is computed once per prompt.
        window: steps that stay stochastic, the others follow the ODE; null: all.
        latents_dtype: in which trajectories are stored.
    """

    kind: str
    num_steps: int
    eta: float
    height: int
    width: int
    shift: float | None = None
    guidance_scale: float = 1.0
    frames: int = 1
    fps: float | None = None
    negative_prompt: str = ""
    shared_noise: bool = True
    window: list[int] | None = None
    latents_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _at_least("sampler.num_steps", self.num_steps, 2)
        _at_least("sampler.eta", self.eta, 0)
        _positive("sampler.height", self.height)
        _positive("sampler.width", self.width)
        _at_least("sampler.frames", self.frames, 1)
        if self.fps is not None:
            _positive("sampler.fps", self.fps)
        check_text("sampler.negative_prompt", self.negative_prompt)

    def torch_dtype(self) -> torch.dtype:
        """`latents_dtype` as torch names it."""
        return torch.bfloat16 if self.latents_dtype == "bfloat16" else torch.float32


@dataclass
class RewardSettings:
    """One reward.

    Args:
        name: a reward of this package, or `module:callable`: of a file beside the recipe or in the working folder, for
            the commands of `dancegrpo-fast`, or of an installed package.
        weight: factor of its advantages; less than 0 makes it small.
        threshold: score 1 above it and 0 at or below it.
        win_rate: the score is the share of the other samples of its prompt's group that it beats, ties half. The mean
            of every group is 1/2, so report the plain score beside it.
        args: keyword arguments of its constructor.
        label: what metrics and tables call it; null: its name, with what is done to its scores.
    """

    name: str
    weight: float = 1.0
    threshold: float | None = None
    win_rate: bool = False
    label: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"rewards.weight: got {self.weight}, want a number other than 0")
        if self.win_rate and self.threshold is not None:
            raise ValueError(f"rewards.win_rate: got true beside threshold {self.threshold:g}, want one of the two")
        try:
            json.dumps(self.args, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rewards.args: got {self.args}, want plain values: {error}") from error


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
        kl_weight: of the KL to the model as loaded.
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
            _at_least(f"train.{name}", getattr(self, name), 1)
        _at_least("train.group_size", self.group_size, 2)
        for name in ("learning_rate", "max_grad_norm", "advantage_clip"):
            _positive(f"train.{name}", getattr(self, name))
        for bound in self.clip_range if isinstance(self.clip_range, (tuple, list)) else (self.clip_range,):
            _positive("train.clip_range", bound)
        for name in ("weight_decay", "kl_weight"):
            _at_least(f"train.{name}", getattr(self, name), 0)
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


@dataclass
class EvaluationSettings:
    """Samples from fixed prompts and noises, scored but never trained on.

    Args:
        every: iterations between evaluations; the first and the last are always evaluated.
        prompts: file of the prompts; null takes the training prompts.
        samples_per_prompt: fixed noises of each prompt; at least 2 in training, which follows the diversity.
        rewards: scores to report, at least one, trained on or not.
        grid_samples: samples of each prompt in the pictures.
        grid_prompts: prompts in the pictures, the first of the file.
    """

    every: int = 10
    prompts: str | None = None
    samples_per_prompt: int = 4
    rewards: list[RewardSettings] = field(default_factory=list)
    grid_samples: int = 3
    grid_prompts: int = 10

    def __post_init__(self) -> None:
        _at_least("evaluation.every", self.every, 1)
        _at_least("evaluation.samples_per_prompt", self.samples_per_prompt, 1)
        _at_least("evaluation.grid_prompts", self.grid_prompts, 1)
        if not self.rewards:
            raise ValueError("evaluation.rewards: got none, want at least one score")
        if not 1 <= self.grid_samples <= self.samples_per_prompt:
            raise ValueError(
                f"evaluation.grid_samples: got {self.grid_samples}, "
                f"want 1 to samples_per_prompt, {self.samples_per_prompt}"
            )


@dataclass
class Recipe:
    """A whole run.

    Args:
        name: what the run is called, in its folder and its lines.
        model: the generator.
        sampler: how samples are drawn.
        prompts: `.txt`, `.jsonl` or `.parquet` file, or a folder with `train.*`.
        rewards: what is maximised; several rewards sum their advantages.
        train: the optimisation.
        evaluation: what is measured beside it; null: nothing.
        output_dir: of metrics, checkpoints and pictures; null: `runs/<name>`.
        seed: everything random follows from it.
        checkpoint_every: iterations between checkpoints.
        keep_checkpoints: how many of the newest stay.
        threads: torch's CPU threads; null: the processors this process may use.
    """

    name: str
    model: ModelSettings
    sampler: SamplerSettings
    prompts: str
    rewards: list[RewardSettings]
    train: TrainSettings
    evaluation: EvaluationSettings | None = None
    output_dir: str | None = None
    seed: int = 0
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards: got none, want at least one")
        if "block_inputs" in self.train.offload and self.model.checkpointing == "none":
            raise ValueError('train.offload: got "block_inputs" with model.checkpointing "none", want it to checkpoint')
        _at_least("seed", self.seed, 0)
        _at_least("checkpoint_every", self.checkpoint_every, 1)
        _at_least("keep_checkpoints", self.keep_checkpoints, 1)
        if self.threads is not None:
            _at_least("threads", self.threads, 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written into checkpoints."""
        return asdict(self)


# Of commands' own options.
HELP = {"iterations": "how many are measured, after one that is not", "figures": "draws them into this folder"}


def load_recipe(arguments: Sequence[str], command: str = "train", **options: str | None) -> tuple[Recipe, Any]:
    """A recipe file with overrides, and the command's own options.

    Args:
        arguments: the recipe's path, then `--field.name value` overrides.
        command: of this program.
        options: the command's own, with their defaults.

    Raises:
        ValueError: a missing file, an unknown field, or a value of the wrong type or range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    usage = f"dancegrpo-fast {command} RECIPE.yaml [--FIELD VALUE ...]"
    parser = ArgumentParser(usage, usage=usage, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="the recipe")
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=str | None, default=default, help=HELP.get(name))
    parser.add_class_arguments(Recipe, None)
    path = Path(arguments[0])
    if not path.is_file() and arguments[0] not in ("-h", "--help"):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"recipe: got {path}, which {what}; want a YAML file")
    given = list(arguments) if arguments[0] in ("-h", "--help") else ["--config", str(path), *arguments[1:]]
    try:
        namespace = parser.parse_args(given)
        found = {name: namespace.pop(name) for name in options}
        namespace.pop("config", None)
        return Recipe(**vars(parser.instantiate(namespace))), found
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe: got {path}, want UTF-8: {error}") from error
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"recipe: {path}: {_reason(error)}") from error
    except ValueError as error:
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What jsonargparse says, without the types that it tried and the whole of what it was given."""
    frame = ("Does not validate", "Subtypes:", "Errors:", "Problem with given class_path", "Given value")
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    return " ".join(line for line in lines if not line.startswith((*frame, "Expected a <class 'NoneType'>")))
