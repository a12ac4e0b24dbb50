"""What is traced: a model of some size, its kinds of blocks, and how many of each a small one has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from ...activations import checkpointing
from . import guessed, specs
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
    `reference`: height and width of a picture that is edited, in pixels.
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
    reference: tuple[int, int] = (0, 0)
    quantization: str = "none"
    lora_dropout: bool = False


class Kind(NamedTuple):
    """Blocks of one kind: the list that holds them, the first and how many, and how many a small model has."""

    path: str
    start: int
    blocks: int
    least: int


# More kinds than that are traced as one.
MOST_KINDS = 5


@lru_cache(maxsize=16)
def resolved(model: str) -> specs.Spec:
    """`specs.resolve`, once."""
    return specs.resolve(model)


_kinds: dict[str, tuple[Kind, ...]] = {}


def kinds_of(spec: specs.Spec) -> tuple[Kind, ...]:
    """The kinds of blocks, in the order in which the model runs them; () where all of it is traced.

    Blocks that follow each other in a list of the model and have parameters of the same names and shapes are of a kind.
    """
    key = f"{spec.denoiser} {spec.config}"
    if key not in _kinds:
        _kinds[key] = _found(spec)
    return _kinds[key]


def _found(spec: specs.Spec) -> tuple[Kind, ...]:
    model = specs.prototype(spec)
    paths = checkpointing.block_paths(model)
    kinds: list[Kind] = []
    before: object = None
    for path in paths:
        held, _, place = path.partition(".")
        if not place.isdecimal():
            # In a list within another module, as a UNet's.
            return ()
        block = model.get_submodule(path)
        like = type(block), held, tuple((name, p.shape) for name, p in block.named_parameters())
        if like == before:
            kinds[-1] = kinds[-1]._replace(blocks=kinds[-1].blocks + 1)
        else:
            kinds.append(Kind(held, int(place), 1, 1))
        before = like
    found = _merged(kinds)
    return found if not spec.assumed or _runs_cut(spec, found) else ()


def _runs_cut(spec: specs.Spec, kinds: Sequence[Kind]) -> bool:
    """Whether a model of a class that is not known takes its inputs with other numbers of blocks."""
    for more in (0, 1):
        model = specs.build(spec, blocks=_some(kinds, [kind.least + more for kind in kinds]))
        if not guessed.runs(model, specs.small_inputs(spec)):
            return False
    return True


def _merged(kinds: list[Kind]) -> tuple[Kind, ...]:
    """With a list's last block, where it is another as it has no text to hand on, in the kind before it."""
    found: list[Kind] = []
    for kind, after in zip(kinds, [*kinds[1:], None], strict=True):
        before = found[-1] if found else None
        is_last = after is None or after.path != kind.path
        if kind.blocks == 1 and is_last and before is not None and before.path == kind.path:
            found[-1] = before._replace(blocks=before.blocks + 1, least=2)
        else:
            found.append(kind)
    return tuple(found) if len(found) <= MOST_KINDS else ()


def _some(kinds: Sequence[Kind], counts: Sequence[int]) -> dict[str, list[int]]:
    """So many blocks of each kind, by the path of their list: the first ones and the last; or the first again."""
    found: dict[str, list[int]] = {}
    for kind, count in zip(kinds, counts, strict=True):
        places = [*[kind.start] * (count - kind.blocks), *range(kind.start, kind.start + kind.blocks)]
        found.setdefault(kind.path, []).extend([*places[: count - 1], places[-1]])
    return found


def build(case: Case, counts: Sequence[int]) -> nn.Module:
    """The denoiser on `meta` with LoRA layers and block ops.

    Raises:
        ValueError: LoRA targets that match nothing, or block ops that the model cannot have.
    """
    from ...lora import ADAPTER, add_lora, unmatched
    from ...lora import layers as lora_layers
    from ...patch import accelerate

    spec = resolved(case.spec)
    dtype = torch.float32 if case.dtype == "fp32_master" else torch.bfloat16
    model = specs.build(spec, dtype, _some(kinds_of(spec), counts))
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
        # Lengths cannot be read off fakes, whose text counts whole and keeps its mask.
        accelerate(model, case.block_ops, recompute=case.recompute)
    if case.sequence_parallel > 1:
        _split(model, case)
    return model


def _split(model: nn.Module, case: Case) -> None:
    from ... import sequence
    from ..trace.alone import split_alone

    spec = resolved(case.spec)
    count = specs.tokens(spec, case.frames, case.height, case.width, case.reference)
    tokens = {f"a sample of {case.frames} x {case.height} x {case.width}": count}
    text = case.text_tokens or spec.text_tokens
    try:
        sequence.check(model, case.sequence_parallel, case.sequence_kind, tokens, text)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("train.")) from error
    if case.sequence_kind == "ring":
        from ...attention.choice import set_backend

        # The one of torch's that hands out what a ring needs.
        set_backend(model, "_native_flash")
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


def block_paths(spec: specs.Spec) -> tuple[str, ...]:
    """Of the blocks that diffusers checkpoints, in the order in which the model runs them."""
    return tuple(checkpointing.block_paths(specs.prototype(spec)))


@lru_cache(maxsize=32)
def kernel(case: Case, asked: str, device: str, equal_text: bool) -> tuple[str, str]:
    """The attention kernel as traces name it, and why.

    Raises:
        ValueError: a backend that cannot be used, or is unknown.
    """
    if device.startswith("cpu"):
        return "cpu", "attention: as a CPU computes it"
    if asked in KERNELS:
        return asked, f"attention {asked}: as asked" + (_refused(case, device, equal_text) if asked == "flash" else "")
    try:
        return _chosen(case, asked, device, equal_text)
    except ValueError as error:
        raise ValueError(re.sub("^backend:", "attention:", str(error))) from error


def _refused(case: Case, device: str, equal_text: bool) -> str:
    """Why torch's flash would not run this model's calls, if so."""
    try:
        _chosen(case, "_native_flash", device, equal_text)
    except ValueError as error:
        found = re.search("which (.*); want", str(error))
        return (
            ""
            if found is None or "mask" not in found[1]
            else f", but it {found[1]}: such calls are planned with the efficient kernel"
        )
    return ""


def _chosen(case: Case, asked: str, device: str, equal_text: bool) -> tuple[str, str]:
    from ...attention import choice as attention
    from ...attention.facts import MASKS

    spec = resolved(case.spec)
    if spec.denoiser not in MASKS:
        if asked not in ("auto", "native"):
            known = ", ".join(KERNELS)
            raise ValueError(f'attention: got "{asked}" for a {spec.denoiser}, want auto, native, or one of {known}')
        return "flash", "attention native: flash, and efficient where the model hands on a mask, as torch's SDPA"
    model = build(case, least_of(spec))
    tokens = specs.tokens(spec, case.frames, case.height, case.width, case.reference)
    if spec.family.joint:
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
        (settings.reference_height, settings.reference_width),
        settings.quantization if settings.quantization in KINDS else "none",
        settings.lora_dropout > 0,
    )
