"""Standard normals on a counter of their own: a transition whose only term is its noise."""

import math

import torch
from torch import Tensor

from ..backends import check_name
from ..checks import check_dtype, check_int, shown
from ..transitions import TransitionTable
from ._checks import FLOATS, check_per_sample, check_seed
from .transition import empty_like, step_op

# The noise's counter has 32 bits for groups of four elements.
_MOST_ELEMENTS = 2**34


def gaussian_noise(
    shape: tuple[int, ...], *, seed: int, sample_ids: Tensor, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> Tensor:
    """Standard normals `[B, *shape]` keyed by (seed, sample id, element), for initial latents.

    No step of `transition_step` draws from this stream, whatever its seed, ids and step: its key is the seed's
    complement, which no seed is.

    Args:
        shape: one sample's shape, 1 to 8 sizes.
        seed: 0 to 2^63 - 1.
        sample_ids: int64 `[B]`; samples with equal ids get equal noise.
        dtype: of the result.
        backend: as for `transition_step`.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype or range.
    """
    if not isinstance(shape, (tuple, list)) or not 1 <= len(shape) <= 8:
        raise ValueError(f"shape: got {shown(shape)}, want a tuple of 1 to 8 sizes")
    sizes = [check_int("shape", size, 1) for size in shape]
    if math.prod(sizes) > _MOST_ELEMENTS:
        raise ValueError(f"shape: got {tuple(shape)}, want at most 2^34 elements")
    if not isinstance(sample_ids, Tensor) or sample_ids.ndim != 1 or len(sample_ids) == 0:
        raise ValueError(f"sample_ids: got {shown(sample_ids)}, want an int64 tensor of shape [B] with B of at least 1")
    check_per_sample("sample_ids", sample_ids, sample_ids, (torch.int64,))
    check_dtype("dtype", dtype, FLOATS)
    check_name(backend)
    key = -1 - check_seed(seed)
    zeros = torch.zeros((), device=sample_ids.device).expand(len(sample_ids), *sizes)
    # The normals are float32 numbers, which every backend draws.
    out = empty_like(zeros, torch.float32 if dtype == torch.float64 else dtype)
    table = _UNIT_NOISE.packed(out.device)
    step_op(zeros, zeros, out, None, 1.0, table, None, 0, False, backend, None, key, sample_ids, False)
    return out.to(dtype)


_UNIT_NOISE = TransitionTable.from_coefficients([0.0], 0.0, 1.0, kind="none")
