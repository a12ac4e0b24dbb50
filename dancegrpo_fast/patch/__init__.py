"""Puts the block ops into diffusers' transformers, and takes them out again."""

import importlib
from typing import Any

from torch import nn

from ..ops._block import check_mode
from ._pieces import Blocks
from ._recognise import Family, check_sources, following
from ._settings import RECOMPUTE, Accelerated

__all__ = ["SUPPORTED", "Accelerated", "accelerate"]

ON_MISMATCH = ("warn", "eager")
SUPPORTED = {
    "FluxTransformer2DModel": "flux",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwen_image",
    "WanTransformer3DModel": "wan",
}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformer inside DDP, a compiled module or a PeftModel."""
    inner: Any = model
    while type(inner).__name__ not in SUPPORTED:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(found := getattr(inner, "_orig_mod", None) or getattr(inner, "module", None), nn.Module):
            inner = found
        else:
            break
    return inner  # type: ignore[no-any-return]  # walked by attributes


def family_of(transformer: nn.Module) -> Family:
    """The family that patches this model.

    Raises:
        ValueError: no family does; the message lists those there are.
    """
    name = type(transformer).__name__
    if name not in SUPPORTED or not type(transformer).__module__.startswith("diffusers."):
        known = ", ".join(SUPPORTED)
        raise ValueError(f"transformer: got {type(transformer).__module__}.{name}, want one of diffusers' {known}")
    family: Family = importlib.import_module(f".{SUPPORTED[name]}", __name__).FAMILY
    return family


def accelerate(
    transformer: nn.Module,
    mode: str = "lossless",
    *,
    recompute: str = "gelu",
    trim_text: bool | None = None,
    gates_from_weights: bool = False,
    on_mismatch: str = "warn",
    backend: str = "auto",
) -> Accelerated:
    """Rewires the blocks of a diffusers transformer, on the instance, to the block ops.

    Weights, state-dict keys, LoRA (added before or after), gradient checkpointing, `set_attention_backend`, context
    parallelism (enabled after) and `torch.compile` work as before. Roll out and replay with the same settings. A deep
    copy and a replica of DataParallel have the block ops, too; what `torch.save(transformer)` writes has not, and opens
    without this package. A block runs as diffusers has it, with a warning, where hooks are on modules that the ops
    stand in for: norms, attention, feed-forwards.

    Args:
        transformer: FluxTransformer2DModel, HunyuanVideoTransformer3DModel (SkyReels too), SD3Transformer2DModel,
            QwenImageTransformer2DModel or WanTransformer3DModel; also inside a PeftModel, DDP or compiled module.
        mode: "lossless" rounds where diffusers' blocks do; "fast" computes each op in float32 and rounds once.
        recompute: what the backward computes again instead of keeping it. "gelu": GELU's results, the widest there
            are; "all": also normalised tokens, queries and keys; "none".
        trim_text: HunyuanVideo and Qwen-Image: attention goes by the lengths of the prompts, by one call of a varlen
            kernel or one of any kernel for each sample, in place of a mask, which flash attention does not take.
            Lengths are read once for each new mask; a sample's results depend on its own alone. Compiled blocks and
            context parallelism keep the mask. None: in "fast" mode only, as it changes the last bits.
        gates_from_weights: full fine-tuning in "fast" mode: take the gradients of the gates from those of the
            projections' weights, so that what is gated is not kept. Layers that are frozen or not plain `nn.Linear`
            keep it as before.
        on_mismatch: what follows where the first call of a "lossless" op with these dtypes, widths and operands differs
            on this device from eager torch by more than it may (`ops/selfcheck.py`): "warn", or "eager", that call
            and all like it computed by eager torch on every rank.
        backend: of the ops: "auto" (Triton on a GPU, else plain torch), "triton" or "reference".

    Returns:
        A callable that restores the model.

    Raises:
        ValueError: an unsupported model, one whose code differs from the diffusers this was written for, one that is
            patched or hooked already, or an unknown setting. The model is unchanged then.
    """
    check_mode(mode)
    if recompute not in RECOMPUTE:
        raise ValueError(f'recompute: got "{recompute}", want one of {", ".join(RECOMPUTE)}')
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f'backend: got "{backend}", want "auto", "triton" or "reference"')
    if on_mismatch not in ON_MISMATCH:
        raise ValueError(f'on_mismatch: got "{on_mismatch}", want one of {", ".join(ON_MISMATCH)}')
    if on_mismatch == "eager" and (mode != "lossless" or backend == "triton"):
        got = f'mode "{mode}" and backend "{backend}"'
        raise ValueError(f'on_mismatch: got "eager" with {got}, want mode "lossless" and backend "auto"')
    if gates_from_weights and mode != "fast":
        raise ValueError(f'gates_from_weights: got True with mode "{mode}", want "fast" (it rounds elsewhere)')
    inner = _unwrapped(transformer)
    family = family_of(inner)
    if trim_text and not family.trims:
        raise ValueError(f"trim_text: got True for {type(inner).__name__}, want it for HunyuanVideo or Qwen-Image")
    check_sources(family)
    family.check(inner)
    trimmed = mode == "fast" if trim_text is None else trim_text
    checked = on_mismatch == "eager" and backend == "auto"
    blocks = Blocks(mode, recompute, trimmed, gates_from_weights, "checked" if checked else backend)
    made = family.forwards(inner, blocks)
    forwards = ((module, following(family, forward, module is not inner)) for module, forward in made)
    return Accelerated(inner, forwards)
