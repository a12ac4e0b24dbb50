"""Bars of what an iteration goes through, for a person at a terminal."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def counted(items: Sequence[_T], what: str) -> Iterable[_T]:
    """`items` themselves; where standard error is a terminal, in the first process, with a bar that leaves no trace."""
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if not (first and sys.stderr.isatty()):
        return items
    from tqdm import tqdm

    bar: Iterable[_T] = tqdm(items, desc=what, leave=False, dynamic_ncols=True)
    return bar
