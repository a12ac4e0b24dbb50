"""What is traced: a model of some size, its kinds of blocks, and how many of each a small one has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from ...activations import checkpointing
from . import specs
from .converted import KINDS, convert
from .settings import KERNELS, Settings

# Of `Case.dtype`: those of 16-bit weights whose LoRA layers may be wider.
NARROW = ("bf16", "autocast")
KERNEL_OF = {"cuDNN": "cudnn", "efficient": "efficient", "xformers": "efficient", "math": "math", "flex": "flash"}


@dataclass(frozen=True)
class Case:
    """What a trace of a denoiser depends on, beside its policy and its number of blocks.

    `dtype`: "bf16", "autocast" (16-bit weights under it), "fp32_master" (float32 under autocast) or "bf16_autocast", as
    FSDP2 gathers float32 masters.
    `kernel`: of attention; "cpu" is a call as a CPU computes it. `fused_norm`: RMSNorm is one operator.
    `fresh`: gradients are new in every call, as of gathered parameters; a block's are in its own moment only.
    `quantization`: "nf4" or "int8" where layers are `converted`'s; fp8 is a formula beside the trace.
    """

    spec: str
    frames: int
    height: int
    width: int
    rows: int
    text_tokens: int | None
    dtype: str
    lora: int
    lora_targets: tuple[str, ...]
    lora_dtype: str
    kernel: str
    block_ops: str
    recompute: str
    train: bool
    fresh: bool = False
    fused_norm: bool = True
    sequence_parallel: int = 1
    sequence_kind: str = "ulysses"
    quantization: str = "none"
    lora_dropout: bool = False


class Kind(NamedTuple):
    """Blocks of one kind: the list that holds them, the first and how many, and how many a small model has."""

    path: str
    start: int
    blocks: int
    least: int


@lru_cache(maxsize=16)
def resolved(model: str) -> specs.Spec:
    """`specs.resolve`, once."""
    return specs.resolve(model)


def kinds_of(spec: specs.Spec) -> tuple[Kind, ...]:
    """The kinds of blocks, in the order in which the model runs them; () where all of it is traced."""
    config = spec.config
    if spec.denoiser == "UNet2DConditionModel":
        return ()
    if "num_single_layers" in config:
        return (
            Kind("transformer_blocks", 0, config["num_layers"], 1),
            Kind("single_transformer_blocks", 0, config["num_single_layers"], 1),
        )
    if spec.denoiser == "SD3Transformer2DModel":
        dual = len(config.get("dual_attention_layers") or ())
        # The last block is another: it has no text to hand on.
        plain = Kind("transformer_blocks", dual, config["num_layers"] - dual, 2)
        return (Kind("transformer_blocks", 0, dual, 1), plain) if dual else (plain,)
    path = "blocks" if spec.denoiser == "WanTransformer3DModel" else "transformer_blocks"
    return (Kind(path, 0, config["num_layers"], 1),)


def _sized(spec: specs.Spec, counts: Sequence[int]) -> specs.Spec:
    """The same model with so many blocks of each kind."""
    if not counts:
        return spec
    config = dict(spec.config)
    if "num_single_layers" in config:
        config["num_layers"], config["num_single_layers"] = counts
    else:
        config["num_layers"] = sum(counts)
        if len(counts) == 2:
            config["dual_attention_layers"] = tuple(range(counts[0]))
    return replace(spec, config=config)


def build(case: Case, counts: Sequence[int]) -> nn.Module:
    """The denoiser on `meta` with LoRA layers and block ops.

    Raises:
        ValueError: LoRA targets that match nothing, or block ops that the model cannot have.
    """
    from ...lora import ADAPTER, add_lora, unmatched
    from ...lora import layers as lora_layers
    from ...patch import accelerate

    spec = _sized(resolved(case.spec), counts)
    model = specs.build(spec, torch.float32 if case.dtype == "fp32_master" else torch.bfloat16)
    if case.lora:
        if lost := unmatched(model, case.lora_targets):
            raise ValueError(f"target_modules: got {', '.join(lost)}, want endings of names in {case.spec}")
        try:
            with torch.device("meta"):
                add_lora(model, case.lora, case.lora, case.lora_targets)
        except ValueError as error:
            raise ValueError(
                f"target_modules: got {', '.join(case.lora_targets)}, want endings of names in it"
            ) from error
        if case.lora_dropout:
            for layer in lora_layers(model).values():
                layer.lora_dropout[ADAPTER] = nn.Dropout()
        if case.lora_dtype == "bf16":
            for p in model.parameters():
                p.data = p.data.to(torch.bfloat16) if p.requires_grad else p.data
    if case.quantization != "none":
        convert(model, case.quantization, spec.keep_in_float32)
    if case.dtype == "bf16_autocast":
        # Also what the model keeps in float32.
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16)
    if case.block_ops != "off":
        # Lengths of prompts are not known, and reading them off fakes is impossible: the text counts whole.
        accelerate(model, case.block_ops, recompute=case.recompute, trim_text=False)
    if case.sequence_parallel > 1:
        _split(model, case)
    return model


def _split(model: nn.Module, case: Case) -> None:
    from ... import sequence
    from ..trace.alone import split_alone

    spec = resolved(case.spec)
    count = specs.tokens(spec, case.frames, case.height, case.width)
    tokens = {f"a sample of {case.frames} x {case.height} x {case.width}": count}
    text = case.text_tokens or spec.text_tokens
    try:
        sequence.check(model, case.sequence_parallel, case.sequence_kind, tokens, text)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("train.")) from error
    if case.sequence_kind == "ring":
        # The one of torch's that hands out what a ring needs.
        model.set_attention_backend("_native_flash")  # type: ignore[operator]  # diffusers' ModelMixin
    split_alone(model, case.sequence_parallel, case.sequence_kind)


def least_of(spec: specs.Spec) -> tuple[int, ...]:
    """How many blocks of each kind a small model has."""
    return tuple(min(kind.least, kind.blocks) for kind in kinds_of(spec))


def block_counts(case: Case) -> tuple[int, ...]:
    """How many blocks of each kind the model has."""
    return tuple(kind.blocks for kind in kinds_of(resolved(case.spec)))


@lru_cache(maxsize=2)
def whole_model(case: Case) -> nn.Module:
    """The model with all of its blocks, to look at and not to change."""
    return build(case, block_counts(case))


@lru_cache(maxsize=16)
def block_paths(case: Case) -> tuple[str, ...]:
    """Of the blocks that diffusers checkpoints, in the order in which the model runs them."""
    return tuple(checkpointing.block_paths(whole_model(case)))


@lru_cache(maxsize=32)
def kernel(case: Case, asked: str, device: str, equal_text: bool) -> tuple[str, str]:
    """The attention kernel as traces name it, and why.

    Raises:
        ValueError: a backend that cannot be used, or is unknown.
    """
    if device.startswith("cpu"):
        return "cpu", "attention: as a CPU computes it"
    if asked in KERNELS:
        return asked, f"attention {asked}: as asked"
    try:
        return _chosen(case, asked, device, equal_text)
    except ValueError as error:
        raise ValueError(re.sub("^backend:", "attention:", str(error))) from error


def _chosen(case: Case, asked: str, device: str, equal_text: bool) -> tuple[str, str]:
    from ...attention import choice as attention

    spec = resolved(case.spec)
    model = build(case, least_of(spec))
    tokens = specs.tokens(spec, case.frames, case.height, case.width)
    if "num_single_layers" in spec.config or spec.denoiser in ("SD3Transformer2DModel", "QwenImageTransformer2DModel"):
        tokens += case.text_tokens or spec.text_tokens
    shapes = attention.Shapes(case.rows, tokens, torch.bfloat16, equal_text=equal_text)
    if asked == "auto":
        found = attention.choose(model, shapes, device, True)
    else:
        found = attention.check(model, asked, shapes, device, True)
    return KERNEL_OF.get(found.kernel, "flash"), f"attention {found.reasons[0]}"


def rows_of(settings: Settings, batch: int) -> int:
    """Rows of a call for so many samples: twice as many under guidance by batch."""
    return batch * (2 if settings.guidance_scale != 1 and resolved(settings.model).guides_by_batch else 1)


def case_of(settings: Settings, rows: int, name: str, *, train: bool) -> Case:
    """What is traced: a call of `rows` rows with the attention kernel of that name."""
    # A call does not see masters beside its weights.
    kept, fresh = settings.precision, False
    if settings.dtype != "float32":
        kept = "autocast" if settings.mixed_precision == "bf16" else "bf16"
    if settings.is_sharded:
        # Gathered masters are bf16, of which autocast makes no copies.
        kept = "bf16_autocast" if kept == "fp32_master" else kept
        # A model that is traced as a whole would have the gradients of all blocks.
        fresh = bool(kinds_of(resolved(settings.model)))
    return Case(
        settings.model,
        *(settings.frames, settings.height, settings.width),
        rows,
        settings.text_tokens,
        kept,
        settings.lora,
        settings.target_modules if settings.lora else (),
        "bf16" if settings.lora and kept in NARROW and settings.lora_dtype == "bfloat16" else "fp32",
        name,
        settings.block_ops,
        settings.recompute if settings.block_ops != "off" else "gelu",
        train,
        fresh and train,
        settings.fused_norm,
        settings.sequence_parallel,
        settings.sequence_kind,
        settings.quantization if settings.quantization in KINDS else "none",
        settings.lora_dropout > 0,
    )
