"""Checks shared by the ops: each names the argument, what came and what is wanted."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..transitions import TransitionTable

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StepIndex(NamedTuple):
    """A step as the ops take it: per-sample indices, or one for all."""

    per_sample: Tensor | None
    for_all: int


def check_latents(latents: Tensor) -> None:
    """A float tensor `[B, ...]` with at least one sample, one element and at most eight dimensions a sample."""
    check_float("latents", latents)
    if latents.ndim < 2 or latents.ndim > 9:
        raise ValueError(f"latents: got shape {tuple(latents.shape)}, want [B, ...] with 1 to 8 dimensions a sample")
    if latents.shape[0] == 0:
        raise ValueError(f"latents: got an empty batch of shape {tuple(latents.shape)}, want at least one sample")
    if latents.numel() == 0:
        raise ValueError(f"latents: got shape {tuple(latents.shape)}, want at least one element a sample")


def check_float(name: str, value: Tensor) -> None:
    """A strided tensor of one of the four float dtypes."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {type(value).__name__}, want a torch.Tensor")
    if value.dtype not in FLOATS or value.layout != torch.strided:
        raise ValueError(
            f"{name}: got {value.dtype} ({value.layout}), want a strided float32, bfloat16, float16 or float64 tensor"
        )


def check_like(name: str, value: Tensor | None, latents: Tensor) -> None:
    """A float tensor of the latents' shape and device, or None."""
    if value is None:
        return
    check_float(name, value)
    if value.shape != latents.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want that of latents, {tuple(latents.shape)}")
    if value.device != latents.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, want it on latents' device, {latents.device}")


def check_per_sample(name: str, value: Tensor, latents: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A tensor `[B]` of one of `dtypes` on the latents' device."""
    batch = latents.shape[0]
    if not isinstance(value, Tensor) or value.shape != (batch,) or value.dtype not in dtypes:
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{name}: got {got}, want {wanted} of shape ({batch},)")
    if value.device != latents.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, want it on latents' device, {latents.device}")


def check_guidance(uncond_output: Tensor | None, guidance_scale: float | None, latents: Tensor) -> float:
    """Both or neither of the unconditional output and the scale; returns the scale, 1 without guidance."""
    if (uncond_output is None) != (guidance_scale is None):
        given, missing = (
            ("guidance_scale", "uncond_output") if uncond_output is None else ("uncond_output", "guidance_scale")
        )
        raise ValueError(f"{missing}: got None with {given} given, want both or neither")
    check_like("uncond_output", uncond_output, latents)
    scale = 1.0 if guidance_scale is None else float(guidance_scale)
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale: got {scale}, want a finite number")
    return scale


def check_step(step: int | Tensor, table: TransitionTable, latents: Tensor) -> StepIndex:
    """An index into the table, or int64 `[B]` of them."""
    if isinstance(step, Tensor):
        if step.ndim == 0:
            step = step.expand(latents.shape[0])
        check_per_sample("step", step, latents, (torch.int64,))
        return StepIndex(step, 0)
    if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
        raise ValueError(f"step: got {type(step).__name__}, want an int or an int64 tensor [B]")
    if step < 0 or step >= len(table):
        raise ValueError(f"step: got {step}, want 0 to {len(table) - 1}")
    return StepIndex(None, step)


def check_rounding(rounding: str, table: TransitionTable) -> bool:
    """Whether to round as the published implementations do."""
    if rounding not in ("exact", "reference"):
        raise ValueError(f'rounding: got "{rounding}", want "exact" or "reference"')
    if rounding == "reference" and not table.has_reference_rounding:
        raise ValueError('rounding: got "reference" for a diffusion table, want "exact" (it is defined for flows)')
    return rounding == "reference"
