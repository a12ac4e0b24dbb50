"""Attention of a batch whose samples have unequal numbers of valid tokens, without a mask.

A sample's result depends on its own tokens alone: it is one sequence of a varlen kernel, or has a call of its own.
Where samples of equal length shared a call, kernels could split its work by how many there are.
"""

import functools
import importlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._block import prepare

HALF = (torch.float16, torch.bfloat16)
# Backends that hand their arguments to these functions; all take queries, keys, values, the offsets of both and the
# longest of both, in this order.
_FLASH_2, _TORCH = ("flash_attn", "flash_attn_varlen_func"), ("torch.nn.attention.varlen", "varlen_attn")
_FLASH_3 = ("flash_attn_interface", "flash_attn_varlen_func")
VARLEN = {
    "flash": _FLASH_2,
    "flash_varlen": _FLASH_2,
    "_flash_varlen_3": _FLASH_3,
    "flash_varlen_hub": ("hub", "flash_varlen_hub"),
    "_flash_3_varlen_hub": ("hub", "_flash_3_varlen_hub"),
    "native": _TORCH,
    "_native_flash": _TORCH,
}


@dataclass(frozen=True, eq=False)
class Ragged:
    """The valid tokens of a batch `[B, S]`.

    Attributes:
        tokens: S.
        lengths: how many each sample has.
        runs: of all tokens, one sample behind the other: so many valid ones, so many of padding, and again.
        offsets: int32 `[B + 1]` on the device, where each sample begins among the valid tokens, and their end.
    """

    tokens: int
    lengths: tuple[int, ...]
    runs: tuple[int, ...]
    offsets: Tensor

    @classmethod
    def of(cls, valid: Tensor, device: torch.device) -> "Ragged":
        """From a bool tensor `[B, S]` on the host."""
        kinds, counts = torch.unique_consecutive(valid.flatten(), return_counts=True)
        lengths = valid.sum(dim=1)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        runs = [*([] if kinds[0] else [0]), *counts.tolist()]
        return cls(valid.shape[1], tuple(lengths.tolist()), tuple(runs), offsets.to(device))

    def pack(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` -> the valid tokens `[T, ...]`; a view where there is no padding."""
        parts = x.flatten(0, 1).split_with_sizes(self.runs)[::2]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unpack(self, x: Tensor) -> Tensor:
        """`[T, ...]` -> `[B, S, ...]` with zeros where padding is."""
        paddings = self.runs[1::2]
        zeros = x.new_zeros((max(paddings, default=0), *x.shape[1:]))
        parts = zip_longest(x.split_with_sizes(self.runs[::2]), (zeros[:n] for n in paddings))
        flat = torch.cat([part for part in chain(*parts) if part is not None]) if paddings else x
        joint: Tensor = flat.unflatten(0, (-1, self.tokens))
        return joint


class _Packed(torch.autograd.Function):
    """`Ragged.pack`; with `recomputable` a backward that wants the result packs it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ragged: Ragged, recomputable: bool) -> Tensor:
        prepare(ctx)
        ctx.settings, ctx.recomputable = (ragged,), recomputable
        if recomputable:
            ctx.save_for_backward(x)
        return ragged.pack(x)

    @staticmethod
    def recompute(kept: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return (settings[0].pack(kept[0]),)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ragged,) = ctx.settings
        ctx.kept = ctx.recomputed = None
        return ragged.unpack(grad), None, None


def packed(x: Tensor, ragged: Ragged, recomputable: bool) -> Tensor:
    """`Ragged.pack`, with a backward; `recomputable`: it may be left to `Settings.unsaved`."""
    return cast(Tensor, _Packed.apply(x, ragged, recomputable))


def varlen_place(
    backend: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int
) -> tuple[str, str] | None:
    """Module and name of the function that takes all samples in one call, or None: each has a call of its own.

    Args:
        backend: diffusers' name.
        capability: of the CUDA device; (0, 0) on a CPU.
        dtype: of queries, keys and values.
        head_dim: their last dimension.
    """
    place = VARLEN.get(backend)
    if capability < (8, 0) or dtype not in HALF or head_dim % 8 or head_dim > 256:
        return None
    # Where torch prefers cuDNN, calls of one sample run it, and torch's varlen kernel is the slower FlashAttention-2.
    if place == _TORCH and (not _has_varlen() or (backend == "native" and capability[0] in (9, 10))):
        return None
    return place


@functools.cache
def _there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _has_varlen() -> bool:
    """From torch 2.10 on; another flash attention in its place splits keys by what else is in the batch."""
    if not _there(_TORCH[0]):
        return False
    current = getattr(importlib.import_module("torch.nn.attention"), "current_flash_attention_impl", lambda: None)
    return current() is None


def _varlen(place: tuple[str, str]) -> Callable[..., Any]:
    module, name = place
    if module == "hub":
        from diffusers.models import attention_dispatch as dispatch

        found = dispatch._HUB_KERNELS_REGISTRY[dispatch.AttentionBackendName(name)].kernel_fn
    else:
        found = getattr(importlib.import_module(module), name)
    return cast(Callable[..., Any], found)


def _backend(told: Any) -> str:
    """The name of the backend that diffusers takes for a processor that was told this, or nothing."""
    from diffusers.models import attention_dispatch as dispatch

    found = dispatch._AttentionBackendRegistry.get_active_backend()[0] if told is None else told
    return str(dispatch.AttentionBackendName(found).value)


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
def attend(dispatch: partial[Tensor], query: Tensor, key: Tensor, value: Tensor, ragged: Ragged) -> Tensor:
    """Attention of packed `[T, H, D]`, each sample to itself.

    Args:
        dispatch: attention of `[1, S, H, D]` by the `backend` that it holds, None for diffusers' active one.
        query, key, value: of all samples.
        ragged: where each begins.
    """
    backend, given = _backend(dispatch.keywords["backend"]), (query, key, value)
    dtype = query.dtype if query.dtype == key.dtype == value.dtype else torch.float32
    place = varlen_place(backend, _capability(query), dtype, query.shape[-1])
    if place is not None:
        offsets = ragged.offsets.to(query.device)
        # One sample alone, too: another kernel may have other bits. A bound that does not depend on the batch: nothing
        # that a kernel chooses by it may.
        found = _varlen(place)(*given, offsets, offsets, ragged.tokens, ragged.tokens)
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)
    samples = zip(*(t.unsqueeze(0).split_with_sizes(ragged.lengths, dim=1) for t in given), strict=True)
    outs = [dispatch(*sample)[0] for sample in samples]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class Trimmed(NamedTuple):
    """What a call needs of its text: the first `text` tokens, and `attention` in place of a mask."""

    text: int
    attention: Ragged | None


class _Read:
    """The valid tokens of a mask, and what calls with so many other tokens need of it."""

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.version, self.device = weakref.ref(mask), _version(mask), mask.device
        self.valid = mask.detach().cpu().bool()
        self.made: dict[int, Trimmed | None] = {}


def _version(mask: Tensor) -> int | None:
    """Of its numbers; None where torch does not count changes."""
    return None if mask.is_inference() else mask._version


class Lengths:
    """The valid tokens of the text, read from the device once for each new mask.

    Args:
        text_first: text comes before the other tokens of the joint sequence.
        leading: the model counts the valid tokens and takes so many from the start.
    """

    def __init__(self, *, text_first: bool, leading: bool) -> None:
        self.text_first, self.leading = text_first, leading
        self._last: _Read | None = None

    def __call__(self, model: Any, mask: Tensor, tokens: int) -> Trimmed | None:
        """For a call with this mask `[B, T]` and so many other tokens; None: its attention needs the mask.

        One sample's text is cut. That of several stays, as products of matrices could depend on its length. Compiled
        blocks would be compiled for every length, and context parallelism splits padded tokens.
        """
        # Fake tensors of any kind have nothing to read.
        if type(mask) is not Tensor or mask.is_meta:
            return None
        if getattr(model.transformer_blocks[0].attn.processor, "_parallel_config", None) is not None:
            return None
        compiled = _compiled(model)
        if compiled and mask.shape[0] > 1:
            return None
        found = cast(Trimmed | None, self._read(mask, tokens))
        return Trimmed(found.text, None) if compiled and found is not None else found

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
    def _read(self, mask: Tensor, tokens: int) -> Trimmed | None:
        # Replicas of DataParallel share this object.
        last = self._last
        if last is None or last.mask() is not mask or last.version is None or last.version != _version(mask):
            last = self._last = _Read(mask)
        if tokens not in last.made:
            # What is made in inference mode could not be saved for a backward.
            with torch.inference_mode(False):
                last.made[tokens] = self._trimmed(last, tokens)
        return last.made[tokens]

    def _trimmed(self, read: _Read, tokens: int) -> Trimmed | None:
        valid, counts = read.valid, read.valid.sum(dim=1).tolist()
        leads = all(bool(row[:count].all()) for row, count in zip(valid, counts, strict=True))
        if self.leading and not (leads and all(counts)):
            return None
        if len(counts) == 1 and leads and counts[0] > 0:
            valid = valid[:, : counts[0]]
        others = torch.ones(len(counts), tokens, dtype=torch.bool)
        joint = [valid, others] if self.text_first else [others, valid]
        return Trimmed(valid.shape[1], Ragged.of(torch.cat(joint, dim=1), read.device))


def _compiled(model: Any) -> bool:
    if torch.compiler.is_compiling():
        return True
    blocks = (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ()))
    return any(block._compiled_call_impl is not None or hasattr(block, "_orig_mod") for block in blocks)
