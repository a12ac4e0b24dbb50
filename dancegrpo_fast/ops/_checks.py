"""Checks shared by the ops: each names the argument, what came and what is wanted."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_int, check_number, shown
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


def check_float(name: str, value: Any) -> None:
    """A strided tensor of one of the four float dtypes; what could become one (a list, an array) is not."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {shown(value)}, want a torch.Tensor")
    if value.dtype not in FLOATS or value.layout != torch.strided:
        raise ValueError(
            f"{name}: got {value.dtype} ({value.layout}), want a strided float32, bfloat16, float16 or float64 tensor"
        )


def check_like(name: str, value: Any, latents: Tensor) -> None:
    """A float tensor of the latents' shape and device."""
    check_float(name, value)
    if value.shape != latents.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want that of latents, {tuple(latents.shape)}")
    if value.device != latents.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, want it on latents' device, {latents.device}")


def check_optional(name: str, value: Any, latents: Tensor) -> None:
    """A float tensor of the latents' shape and device, or None."""
    if value is not None:
        check_like(name, value, latents)


def check_per_sample(name: str, value: Any, latents: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A tensor `[B]` of one of `dtypes` on the latents' device."""
    batch = latents.shape[0]
    right = isinstance(value, Tensor) and value.shape == (batch,) and value.dtype in dtypes
    if not right or value.layout != torch.strided:
        wanted = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{name}: got {shown(value)}, want a tensor of {wanted} and shape ({batch},)")
    if value.device != latents.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, want it on latents' device, {latents.device}")


def check_guidance(uncond_output: Tensor | None, guidance_scale: float | None, latents: Tensor) -> float:
    """Both or neither of the unconditional output and the scale; returns the scale, 1 without guidance."""
    scale = 1.0 if guidance_scale is None else check_number("guidance_scale", guidance_scale)
    if (uncond_output is None) != (guidance_scale is None):
        given, missing = (
            ("guidance_scale", "uncond_output") if uncond_output is None else ("uncond_output", "guidance_scale")
        )
        raise ValueError(f"{missing}: got None with {given} given, want both or neither")
    check_optional("uncond_output", uncond_output, latents)
    return scale


def check_table(table: Any) -> None:
    """A sampler."""
    if not isinstance(table, TransitionTable):
        raise ValueError(f"table: got {shown(table)}, want a TransitionTable")


def check_seed(seed: Any) -> int:
    """A key of the noise; the numbers from -2^63 to -1 are the keys of `gaussian_noise`."""
    return check_int("seed", seed, 0, 2**63 - 1)


def check_step(step: int | Tensor, table: TransitionTable, latents: Tensor) -> StepIndex:
    """An index into the table, or int64 `[B]` of them."""
    if isinstance(step, Tensor):
        if step.ndim == 0:
            step = step.expand(latents.shape[0])
        check_per_sample("step", step, latents, (torch.int64,))
        return StepIndex(step, 0)
    return StepIndex(None, check_int("step", step, 0, len(table) - 1, " or an int64 tensor [B]"))


def check_rounding(rounding: str, table: TransitionTable) -> bool:
    """Whether to round as the published implementations do."""
    check_choice("rounding", rounding, ("exact", "reference"))
    if rounding == "reference" and not table.has_reference_rounding:
        raise ValueError('rounding: got "reference" for a diffusion table, want "exact" (it is defined for flows)')
    return rounding == "reference"
