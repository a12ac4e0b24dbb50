"""Outputs with room around them, and lists of tensors compared bit for bit."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..ops.cases import bits

BAND = 64
# A tensor, and the longer one that it lies in.
Room = tuple[Tensor, Tensor]


def guarded(shape: Sequence[int], dtype: torch.dtype) -> Room:
    """Of NaN, inside and around."""
    whole = torch.full((torch.Size(shape).numel() + 2 * BAND,), float("nan"), dtype=dtype)
    return whole[BAND:-BAND].view(shape), whole


def assert_filled(rooms: Iterable[Room]) -> None:
    """All of it is written, and nothing around it."""
    for inside, whole in rooms:
        assert not bool(inside.isnan().any()) and int(whole.isnan().sum()) == 2 * BAND


def assert_same_bits(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    assert [bits(t.detach()) for t in found] == [bits(t.detach()) for t in wanted]
