"""Picks the attention backend of a diffusers model, says why, and refuses those that fail late or change results."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checks import check_bool
from ..patch import _unwrapped
from .facts import FACTS, NO_MASK, PREFERENCE
from .rules import Case, Shapes, attentions, case_of, kernel_of, known, refusal, registry, sdpa_kernels, shares_call

__all__ = ["Choice", "Memory", "Shapes", "apply", "check", "choose"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one attention layer, without context parallelism.

    Attributes:
        query, key, value, out, lse, mask: what the kernel keeps; they live in the forward only if nothing is trained.
            A UNet's are those of its narrowest layer, which has the most tokens.
        saved: kept from forward to backward; 0 without training.
        workspace: the backward's float32 sum of the gradient of the queries; cuDNN may take more.
        scores: `[batch, heads, tokens, tokens]` as the unfused formula holds them; part of `saved` only under "math".
    """

    query: int
    key: int
    value: int
    out: int
    lse: int
    mask: int
    saved: int
    workspace: int
    scores: int


@dataclass(frozen=True)
class Choice:
    """A backend for `apply`, and why.

    Attributes:
        backend: diffusers' name.
        kernel: what is expected to run: "cuDNN", "FA2", "FA3", "FA4", "efficient", "CPU flash", "flex", "math", ...
        mask: "none" (the model has none), "kept" or "dropped".
        mask_condition: what that holds under.
        memory: bytes a layer.
        order: the usable backends, fastest first, as far as torch and their authors state it; no timings.
        reasons: one sentence "backend: ..." for every backend of the installed diffusers, the chosen one first.
    """

    backend: str
    kernel: str
    mask: str
    mask_condition: str
    memory: Memory
    order: tuple[str, ...]
    reasons: tuple[str, ...]


def _tier(name: str, case: Case) -> int:
    """Speed as torch's own order and the kernels' authors state it: 0 is fastest."""
    kernel = kernel_of(name, case)
    if kernel in ("FA3", "FA4") or (kernel == "cuDNN" and case.capability[0] in (9, 10)):
        return 0
    return {"CPU flash": 1, "FA2": 1, "xformers": 1, "cuDNN": 2, "efficient": 2}.get(kernel, 3)


def _memory(name: str, case: Case) -> Memory:
    shapes, kernel = case.shapes, kernel_of(name, case)
    rows = shapes.batch * case.heads * shapes.tokens
    width = case.wide if kernel == "math" else shapes.dtype.itemsize
    tokens = 32 * math.ceil(shapes.tokens / 32) if kernel == "efficient" else shapes.tokens
    one = rows * case.head_dim * width
    out, lse = (0, 0) if kernel == "math" else (one, shapes.batch * case.heads * tokens * 4)
    mask = shapes.batch * shapes.tokens * shapes.dtype.itemsize if case.masked and kernel != "math" else 0
    scores = case.scores(case.wide)
    saved = 3 * one + out + lse + mask + (scores if kernel == "math" else 0)
    fused = case.device == "cuda" and kernel not in ("math", "flex")
    workspace = rows * case.head_dim * 4 if fused and case.training else 0
    return Memory(one, one, one, out, lse, mask, saved if case.training else 0, workspace, scores)


def _choice(name: str, case: Case, usable: list[str], others: list[str]) -> Choice:
    kernel = kernel_of(name, case)
    why = f"{name}: {kernel}, {'trains' if case.training else 'inference'}, "
    why += "holds the scores within max_scores_gib" if kernel in ("math", "flex") else "never holds the scores"
    if name == "native" and case.device == "cuda" and len(sdpa_kernels(case)) > 1:
        why += f"; where torch lacks it, {' or '.join(sdpa_kernels(case)[1:])}"
    if case.ragged:
        why += (
            f"; prompts of unequal length in {'one call' if shares_call(name, case) else 'a call each'}, without a mask"
        )
    if case.mask == "dropped" and FACTS[name].mask == NO_MASK:
        why += "; raises for a call that brings the mask back"
    return Choice(name, kernel, case.mask, case.mask_condition, _memory(name, case), tuple(usable), (why, *others))


def _reluctance(name: str, case: Case, hub_kernels: bool) -> str:
    """Why a usable backend is not picked unasked, or nothing."""
    if FACTS[name].kernel in ("int8", "fp4"):
        return "rounds to 8 bits or fewer, so that a replay in training would see other outputs than the rollout"
    if FACTS[name].no_backward:
        return "cannot train, so that a replay in training would see other last bits than the rollout"
    if FACTS[name].hub and not hub_kernels:
        return "downloads and runs code from the Hub (hub_kernels=True allows it)"
    return ""


def choose(
    model: nn.Module,
    shapes: Shapes,
    device: torch.device | str,
    training: bool,
    *,
    max_scores_gib: float = 1.0,
    hub_kernels: bool = False,
    parallel: str | None = None,
) -> Choice:
    """Picks the fastest backend that is safe; roll out and replay under the one chosen with `training=True`.

    Args:
        model: a FLUX, HunyuanVideo (SkyReels), SD3, Qwen-Image or Wan transformer or a UNet of diffusers, also on
            "meta", in a PeftModel, DDP or compiled. Accelerate it first, with the `trim_text` that will be used.
        shapes: of the longest attention.
        device: the model's, or a description such as "cuda:sm90" to ask about one that is not here.
        training: whether a backward follows.
        max_scores_gib: the most GiB of attention scores a layer that an unfused formula may hold.
        hub_kernels: allow backends that download and run kernels from the Hub.
        parallel: how its tokens will be split: "ulysses", "ring" or "" for not; None: as they are.

    Raises:
        ValueError: an unknown model or device, or no backend is safe; the message says why for each.
    """
    check_bool("hub_kernels", hub_kernels)
    case = case_of(model, shapes, device, training, max_scores_gib, parallel)
    refused: dict[str, str] = {}
    usable, passed = [], {}
    for name in known():
        if name not in FACTS:
            refused[name] = "new in this diffusers, and not judged"
        elif reason := refusal(name, case):
            refused[name] = reason
        else:
            usable.append(name)
            passed[name] = _reluctance(name, case, hub_kernels)
    rank = {name: (_tier(name, case), PREFERENCE.index(name) if name in PREFERENCE else 9) for name in usable}
    usable.sort(key=rank.__getitem__)
    picks = [name for name in usable if not passed[name]]
    if not picks:
        text = "; ".join(f"{name}: {reason}" for name, reason in (refused | passed).items())
        raise ValueError(f"shapes: got {shapes} on {device}, want what some attention backend takes ({text})")
    best = picks[0]
    others = [f"{n}: usable, {passed[n] or _against(n, best, case)}" for n in usable if n != best]
    others += [f"{name}: {reason}" for name, reason in refused.items()]
    return _choice(best, case, usable, others)


def _against(name: str, best: str, case: Case) -> str:
    kernel, fastest = kernel_of(name, case), kernel_of(best, case)
    if _tier(name, case) > _tier(best, case):
        return f"but {kernel} comes after {fastest} by what torch and the kernels' authors state"
    return f"and not stated to be faster ({kernel} against {fastest})"


def check(
    model: nn.Module,
    backend: str,
    shapes: Shapes,
    device: torch.device | str,
    training: bool,
    *,
    max_scores_gib: float = 1.0,
    parallel: str | None = None,
) -> Choice:
    """Judges a backend that was set by hand as `choose` would; arguments as there.

    Raises:
        ValueError: the backend is unknown or must not be used; the message says why.
    """
    case = case_of(model, shapes, device, training, max_scores_gib, parallel)
    if backend not in FACTS or backend not in known():
        judged = ", ".join(name for name in known() if name in FACTS)
        raise ValueError(f'backend: got "{backend}", want one of {judged}')
    if reason := refusal(backend, case):
        raise ValueError(f'backend: got "{backend}", which {reason}; want what choose() picks')
    return _choice(backend, case, [backend], [])


def set_backend(model: Any, backend: str) -> None:
    """Sets a backend on a diffusers model alone.

    `set_attention_backend` also makes it the process's active backend, for every model that was told none; that is
    put back at once.
    """
    active = registry()._active_backend
    try:
        model.set_attention_backend(backend)
    finally:
        registry().set_active_backend(active)


def apply(model: nn.Module, choice: Choice) -> Callable[[], None]:
    """Sets the chosen backend on the model alone, and returns what undoes it.

    Raises:
        ValueError: not a Choice.
        RuntimeError: from diffusers, the backend's library is missing.
    """
    if not isinstance(choice, Choice):
        raise ValueError(f"choice: got {choice!r}, want what choose() or check() returned")
    inner: Any = _unwrapped(model)
    told = [m.processor for m in attentions(inner) if hasattr(m.processor, "_attention_backend")]
    before = [(processor, processor._attention_backend) for processor in told]
    set_backend(inner, choice.backend)

    def undo() -> None:
        for processor, backend in before:
            processor._attention_backend = backend

    return undo
