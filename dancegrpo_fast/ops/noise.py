"""Standard normals from the step's own stream: a transition whose only term is its noise."""

import torch
from torch import Tensor

from ..transitions import TransitionTable
from ._checks import FLOATS
from .transition import transition_step


def gaussian_noise(
    shape: tuple[int, ...],
    *,
    seed: int,
    sample_ids: Tensor,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Standard normals `[B, *shape]` keyed by (seed, sample id, 0, element): the stream of `transition_step` at step 0.

    Args:
        shape: one sample's shape.
        seed: 0 to 2^63 - 1.
        sample_ids: int64 `[B]`; samples with equal ids get equal noise.
        dtype: of the result.
        backend: as for `transition_step`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
    """
    if not shape or min(shape) < 1 or len(shape) > 8:
        raise ValueError(f"shape: got {tuple(shape)}, want 1 to 8 sizes of at least 1")
    if not isinstance(sample_ids, Tensor) or sample_ids.ndim != 1 or len(sample_ids) == 0:
        got = tuple(sample_ids.shape) if isinstance(sample_ids, Tensor) else type(sample_ids).__name__
        raise ValueError(f"sample_ids: got {got}, want an int64 tensor of shape [B] with B of at least 1")
    if dtype not in FLOATS:
        raise ValueError(f"dtype: got {dtype}, want one of {', '.join(map(str, FLOATS))}")
    zeros = torch.zeros((), device=sample_ids.device).expand(len(sample_ids), *shape)
    return transition_step(
        zeros, zeros, _UNIT_NOISE, 0, seed=seed, sample_ids=sample_ids, out_dtype=dtype, backend=backend
    ).latents


def _unit_noise() -> TransitionTable:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return TransitionTable(zero, zero, one, zero, zero, ("none",), zero, zero, zero, zero, zero)


_UNIT_NOISE = _unit_noise()
