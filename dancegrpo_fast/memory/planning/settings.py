"""What a plan is asked for: one frozen dataclass, checked as a whole."""

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .cards import CARDS, USUAL, Rates, card
from .checks import check_integer, check_kind, check_number, check_one_of, check_tuple
from .rewards import Reward

GIB = 2**30
_VERSION = re.compile(r"\d+\.\d+(\..*)?")

POLICIES = ("none", "full", "attention", "matmul", "first:k", "auto")
KERNELS = ("flash", "efficient", "cudnn", "math")
OFFLOAD = ("block_inputs", "text_encoders", "vae", "rewards", "denoiser", "expert")
CHOICES = {
    "dtype": ("bfloat16", "float16", "float32"),
    "master_dtype": ("none", "float32"),
    "mixed_precision": ("no", "bf16"),
    "lora_dtype": ("float32", "bfloat16"),
    "quantization": ("none", "int8", "nf4", "fp8"),
    "block_ops": ("off", "lossless", "fast"),
    "recompute": ("none", "gelu", "all"),
    "strategy": ("full_shard", "shard_grad_op", "none"),
    "gradient_sync": ("auto", "update", "call"),
    "passes": ("2", "1", "retain", "reweight"),
    "sequence_kind": ("ulysses", "ring"),
    "text_encoders": ("resident", "freed", "precomputed"),
    "vae_tiling": ("auto", "on", "off"),
    "frozen_dtype": ("bfloat16", "float16", "float32"),
    "text_encoder_quantization": ("none", "int8", "nf4", "fp8"),
    "second_expert": ("trained", "frozen", "left_out"),
}
OPTIMIZERS = ("adamw", "adamw_foreach", "adamw8bit", "adafactor", "lion", "prodigy", "other")


@dataclass(frozen=True)
class Settings:
    """One GPU's share of a GRPO run.

    Attributes:
        model: a shipped name, a diffusers folder, or a name on the hub.
        frames, height, width: in pixels.
        group_size: samples of each prompt.
        prompts: of one iteration on this GPU, or on those that share its samples.
        micro_batch: samples of one training call.
        rollout_batch: samples of one rollout, decode and reward call.
        num_steps: of the sampler.
        timestep_fraction: share of the steps that is trained on.
        passes: "2", or in one pass "retain" or "reweight", as of the trainer's `train.passes`; "1": which of them fits
            and is faster.
        trained_share: of the samples, that are trained on where a replay follows, as best-of-N chooses them.
        guidance_scale: of classifier-free guidance. Other than 1 it doubles the rows of a call, unless the model has
            embedded guidance.
        text_tokens: of one prompt; None: as the model's pipeline pads it.
        dtype: of the denoiser's weights, gradients and states: "bfloat16", "float16" or "float32".
        master_dtype: "float32": the optimiser steps float32 copies of 16-bit weights, with float32 gradients then.
        mixed_precision: "bf16": autocast, which float32 weights are planned with and 16-bit weights can have; under
            FSDP shards are gathered in bf16 besides.
        lora: rank, or 0 for full fine-tuning.
        target_modules: endings of the module names that get LoRA layers.
        lora_dtype: of the LoRA layers of a 16-bit model: "float32", as the trainer and peft's `get_peft_model` make
            them, or "bfloat16", as diffusers' `add_adapter` alone does. Each float32 layer keeps a float32 copy of its
            input for the backward.
        lora_dropout: of what goes into the LoRA layers, whose masks are kept; the trainer has none.
        quantization: how frozen weights are stored under LoRA: "none" (as is), "int8", "nf4" (bitsandbytes') or "fp8"
            (layerwise casting); see `quantised`.
        blocks_to_swap: under LoRA, frozen weights of so many blocks and two more wait on the host and stream through
            two buffers; "auto": as few as fit, or more where that is faster; see `swapping`.
        checkpointing: what the backward recomputes: "none", "full", "attention", "matmul", "first:k" (full
            for the first k), "auto".
        attention: "auto", a kernel ("flash", "efficient", "cudnn", "math"), or a backend by diffusers' name.
        device: that attention is chosen for, such as "cuda:sm90"; "cpu": calls are traced as a CPU computes them.
        torch_version: of the torch that will run, such as "2.7": before 2.9 CUDA has no fused RMSNorm. "": this one.
        block_ops: `accelerate` mode of the blocks, or "off".
        recompute: its argument of that name.
        fsdp: how many GPUs share the weights.
        strategy: "full_shard", "shard_grad_op" (weights stay gathered between forward and backward), or "none".
        rollout_replica: under FSDP, weights stay gathered during a rollout.
        gradient_sync: when gradients are reduced: once an "update", until when they are all there in float32, or after
            every model "call". "auto": once an update, unless that does not fit or is slower. Without FSDP they are
            there anyway.
        sequence_parallel: how many of the GPUs share a sample's tokens.
        sequence_kind: how: "ulysses" or "ring".
        offload: what waits in host memory while it is not used: some of `OFFLOAD`.
        vae_tiling: decode in tiles: "on", "off", or "auto", where a whole decode does not fit, in the largest that do.
        vae_tile: side of a tile in pixels; None: with "on" the VAE's own, or half of a picture that is no larger.
        frozen_dtype: of the weights of VAE, text encoders and other parts.
        evaluation_height, evaluation_width, evaluation_guidance_scale: of an evaluation's samples, where they differ.
        optimizer: "adamw", "adamw_foreach" (torch's default on CUDA), "adamw8bit" (bitsandbytes'), "adafactor",
            "lion", "prodigy", any torch optimiser as "module:Class", or "other", which keeps `state_bytes`. Of those
            that are not AdamW the states are counted, and nothing that their step takes.
        state_bytes: that an "other" optimiser keeps of each trained number.
        rewards: reward models.
        others: what else rests on the device throughout, such as the model of a KL.
        text_encoders: "resident", "freed" (on the device only while they encode), "precomputed" (never loaded).
        trajectory_copies: 2 where the update indexes the whole trajectory into a new tensor.
        text_encoder_quantization: how the linear layers of what makes the conditions are stored, as of
            `quantization`.
        kl_reference: whether a KL is taken to the model as it starts: a copy of all weights in full fine-tuning, none
            under LoRA, whose layers are switched off; and one more forward.
        ema: whether a float32 moving average of what is trained is kept.
        second_expert: of models of two denoisers (Wan 2.2 A14B): "trained" as the first is, "frozen", or "left_out".
            Both are on the device, unless "expert" is in `offload`: then the weights of the one that does not run wait
            on the host.
        reference_height, reference_width: of a picture to edit, in pixels, whose tokens are in every call (FLUX
            Kontext, FLUX.2, Qwen-Image-Edit); 0: none. Of several beside each other their common height, and the sum
            of their widths.
        expandable_segments: of CUDA's allocator, which the trainer asks for.
        gpu_gib: capacity, as torch sees it.
        rates: assumed speeds.
        card: the name of the card that capacity, rates and device are of (`on` sets all four), or "".
        measured: the name of the device whose speed was measured to be `rates`, or "".
    """

    model: str
    frames: int = 1
    height: int = 512
    width: int = 512
    group_size: int = 12
    prompts: int = 1
    micro_batch: int = 1
    rollout_batch: int = 1
    num_steps: int = 16
    timestep_fraction: float = 0.6
    passes: str = "2"
    trained_share: float = 1.0
    guidance_scale: float = 1.0
    text_tokens: int | None = None
    dtype: str = "bfloat16"
    master_dtype: str = "none"
    mixed_precision: str = "no"
    lora: int = 0
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_dtype: str = "float32"
    lora_dropout: float = 0.0
    quantization: str = "none"
    blocks_to_swap: int | Literal["auto"] = 0
    checkpointing: str = "auto"
    attention: str = "auto"
    device: str = "cuda:sm90"
    torch_version: str = ""
    block_ops: str = "off"
    recompute: str = "gelu"
    fsdp: int = 1
    strategy: str = "full_shard"
    rollout_replica: bool = False
    gradient_sync: str = "auto"
    offload: tuple[str, ...] = ()
    vae_tiling: str = "auto"
    vae_tile: int | None = None
    frozen_dtype: str = "bfloat16"
    evaluation_height: int | None = None
    evaluation_width: int | None = None
    evaluation_guidance_scale: float | None = None
    sequence_parallel: int = 1
    sequence_kind: str = "ulysses"
    optimizer: str = "adamw"
    state_bytes: float = 8.0
    rewards: tuple[Reward, ...] = ()
    others: tuple[Reward, ...] = ()
    text_encoders: str = "freed"
    trajectory_copies: int = 1
    text_encoder_quantization: str = "none"
    kl_reference: bool = False
    ema: bool = False
    second_expert: str = "trained"
    reference_height: int = 0
    reference_width: int = 0
    expandable_segments: bool = True
    gpu_gib: float = CARDS[USUAL].gib
    rates: Rates = CARDS[USUAL].rates
    card: str = ""
    measured: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "checkpointing", "attention", "device", "torch_version"):
            check_kind(name, getattr(self, name), str, "a string")
        for name in ("rollout_replica", "kl_reference", "ema", "expandable_segments"):
            check_kind(name, getattr(self, name), bool, "True or False")
        check_kind("rates", self.rates, Rates, "Rates")
        for name in ("target_modules", "offload"):
            check_tuple(name, getattr(self, name), str, "strings")
        for name in ("rewards", "others"):
            check_tuple(name, getattr(self, name), Reward, "Rewards")
        counts = ("frames", "height", "width", "group_size", "prompts", "micro_batch", "rollout_batch", "num_steps")
        for name in (*counts, "fsdp", "sequence_parallel", "trajectory_copies"):
            check_integer(name, getattr(self, name), 1)
        for name in ("lora", "reference_height", "reference_width"):
            check_integer(name, getattr(self, name), 0)
        if self.blocks_to_swap != "auto":
            check_integer("blocks_to_swap", self.blocks_to_swap, 0, ', or "auto"')
        for name in ("text_tokens", "vae_tile", "evaluation_height", "evaluation_width"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.evaluation_guidance_scale is not None:
            check_number("evaluation_guidance_scale", self.evaluation_guidance_scale)
        for name, known in CHOICES.items():
            check_one_of(name, getattr(self, name), known)
        check_kind("optimizer", self.optimizer, str, "a string")
        if not all(self.optimizer.partition(":")):
            check_one_of("optimizer", self.optimizer, (*OPTIMIZERS, "module:Class"))
        for what in self.offload:
            check_one_of("offload", what, OFFLOAD)
        if "" in self.target_modules:
            raise ValueError(f"target_modules: got {self.target_modules!r}, want endings of module names")
        check_number("gpu_gib", self.gpu_gib)
        check_number("guidance_scale", self.guidance_scale)
        if self.state_bytes:
            check_number("state_bytes", self.state_bytes)
        for field in fields(Rates):
            check_number(f"rates.{field.name}", getattr(self.rates, field.name))
        if self.lora_dropout:
            check_number("lora_dropout", self.lora_dropout)
        if self.lora_dropout >= 1 or (self.lora_dropout and not self.lora):
            wanted = "less than 1" if self.lora else "0 without LoRA"
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, want {wanted}")
        for name in ("timestep_fraction", "trained_share"):
            check_number(name, getattr(self, name))
            if getattr(self, name) > 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want more than 0 and at most 1")
        if self.card:
            card(self.card)
        self.first_blocks()
        self._check_together()

    def _check_together(self) -> None:
        samples = self.group_size * self.prompts
        if self.vae_tile is not None and self.vae_tiling == "off":
            raise ValueError(f'vae_tile: got {self.vae_tile} with vae_tiling "off", want "on" or "auto"')
        if self.torch_version and not _VERSION.fullmatch(self.torch_version):
            raise ValueError(f'torch_version: got "{self.torch_version}", want one such as "2.7"')
        for name in ("micro_batch", "rollout_batch"):
            if getattr(self, name) > samples:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at most group_size * prompts = {samples}")
        if self.quantization != "none" and not self.lora:
            raise ValueError(
                f'quantization: got "{self.quantization}" with full fine-tuning, want "none", or a LoRA rank'
            )
        if self.quantization != "none" and self.fsdp > 1 and self.strategy != "none":
            raise ValueError(f'quantization: got "{self.quantization}" with fsdp {self.fsdp}, want "none" or fsdp 1')
        if self.quantization != "none" and self.dtype != "bfloat16":
            raise ValueError(f'quantization: got "{self.quantization}" with dtype "{self.dtype}", want "bfloat16"')
        if self.blocks_to_swap != 0 and (not self.lora or self.is_sharded):
            kind = f"fsdp {self.fsdp}" if self.lora else "full fine-tuning"
            raise ValueError(f"blocks_to_swap: got {self.blocks_to_swap!r} with {kind}, want 0, or LoRA without shards")
        if self.dtype == "float16" and self.mixed_precision != "no":
            raise ValueError(f'mixed_precision: got "{self.mixed_precision}" with dtype "float16", want "no"')
        if self.dtype == "float32" and self.mixed_precision == "no":
            raise ValueError('mixed_precision: got "no" with dtype "float32", want "bf16", or 16-bit weights')
        if self.master_dtype != "none" and (self.lora or self.dtype == "float32"):
            kind = f"lora {self.lora}, whose layers are float32" if self.lora else 'dtype "float32"'
            raise ValueError(f'master_dtype: got "{self.master_dtype}" with {kind}, want "none"')
        if self.lora and not self.target_modules:
            raise ValueError(f"target_modules: got none with rank {self.lora}, want endings of module names")
        if self.rollout_replica and not self.is_sharded:
            raise ValueError(
                f'rollout_replica: got True with fsdp {self.fsdp} and strategy "{self.strategy}", want shards'
            )
        if self.fsdp % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel: got {self.sequence_parallel} with fsdp {self.fsdp}, want a divisor of the GPUs"
            )
        if self.sequence_kind == "ring" and self.sequence_parallel > 1 and self.attention in ("efficient", "math"):
            raise ValueError(f'attention: got "{self.attention}" with a ring, want "flash", "cudnn" or "auto"')
        if "block_inputs" in self.offload and (self.checkpointing == "none" or self.first_blocks() == 0):
            raise ValueError(
                f'offload: got block_inputs with checkpointing "{self.checkpointing}", want a policy that checkpoints'
            )
        for what in ("denoiser", "expert"):
            if what in self.offload and self.fsdp > 1:
                raise ValueError(f"offload: got {what} with fsdp {self.fsdp}, want fsdp 1")
        others = {
            "full fine-tuning": not self.lora,
            f'quantization "{self.quantization}"': self.quantization in ("nf4", "int8"),
            f"blocks_to_swap {self.blocks_to_swap}": self.blocks_to_swap != 0,
        }
        for name, there in others.items():
            if there and "expert" in self.offload:
                raise ValueError(f"offload: got expert with {name}, want one of them")
        if self.quantization == "int8" and "denoiser" in self.offload:
            # bitsandbytes keeps its codes beside the parameters that torch would move.
            raise ValueError('offload: got denoiser with quantization "int8", want "nf4" or "fp8", or not both')
        if bool(self.reference_height) != bool(self.reference_width):
            raise ValueError(
                f"reference_height: got {self.reference_height} with reference_width {self.reference_width}, want both"
            )
        if self.text_encoders == "precomputed" and "text_encoders" in self.offload:
            raise ValueError('offload: got text_encoders with text_encoders "precomputed", want one of them')

    def first_blocks(self) -> int | None:
        """k of "first:k", else None.

        Raises:
            ValueError: an unknown policy.
        """
        start, _, count = self.checkpointing.partition(":")
        if start == "first" and count.isdecimal():
            return int(count)
        if self.checkpointing not in POLICIES or start == "first":
            raise ValueError(
                f'checkpointing: got "{self.checkpointing}", want one of {", ".join(POLICIES)} with k an integer'
            )
        return None

    @property
    def scored(self) -> int:
        """Samples that this GPU decodes and scores: those that share samples share that out."""
        return math.ceil(self.samples / self.sequence_parallel)

    @property
    def scored_batch(self) -> int:
        """Samples of one decode and reward call."""
        return min(self.rollout_batch, self.scored)

    @property
    def precision(self) -> str:
        """ "bf16" (any 16 bits), "bf16_master" (beside float32 copies) or "fp32_master" (float32 under autocast)."""
        if self.dtype == "float32":
            return "fp32_master"
        return "bf16" if self.master_dtype == "none" else "bf16_master"

    @property
    def dtypes(self) -> str:
        """In words."""
        masters = " with float32 masters" if self.precision == "bf16_master" else ""
        return self.dtype + masters + (" under bf16 autocast" if self.mixed_precision == "bf16" else "")

    @property
    def is_sharded(self) -> bool:
        """Whether weights are shared among GPUs."""
        return self.fsdp > 1 and self.strategy != "none"

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU runs it."""
        return self.device.startswith("cpu")

    @property
    def fused_norm(self) -> bool:
        """Whether RMSNorm is one operator there."""
        if self.on_cpu:
            return False
        version = self.torch_version
        if not version:
            import torch

            version = torch.__version__
        major, minor = version.split(".")[:2]
        # github.com/pytorch/pytorch/pull/153666, which 2.8 had not; issue 157345 there.
        return (int(major), int(minor)) >= (2, 9)

    @property
    def evaluation(self) -> "Settings | None":
        """The same with evaluation's sizes and guidance, where calls are larger then."""
        own = {
            name: getattr(self, f"evaluation_{name}")
            for name in ("height", "width", "guidance_scale")
            if getattr(self, f"evaluation_{name}") is not None
        }
        there = replace(self, **own)
        more_rows = there.guidance_scale != 1 and self.guidance_scale == 1
        return there if there.height * there.width > self.height * self.width or more_rows else None

    @property
    def samples(self) -> int:
        """Of one iteration on this GPU."""
        return self.group_size * self.prompts

    @property
    def capacity(self) -> str:
        """Of the device, in words."""
        return f"{CARDS[self.card].label}, {self.gpu_gib:g} GiB" if self.card else f"{self.gpu_gib:g} GiB"

    def on(self, name: str) -> "Settings":
        """The same on a known card.

        Raises:
            ValueError: it is not known.
        """
        found = card(name)
        return self.changed(card=name, gpu_gib=found.gib, rates=found.rates, device=found.device)

    def changed(self, **changes: Any) -> "Settings":
        """The same with other values.

        Raises:
            ValueError: they contradict.
        """
        if "gpu_gib" in changes and changes["gpu_gib"] != self.gpu_gib:
            changes = {"card": ""} | changes
        if "rates" in changes:
            changes = {"measured": ""} | changes
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
