"""Tensors in the files of a checkpoint, which are read where they are sliced."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where torch.distributed.checkpoint says in a safetensors file at which place of the whole each of its tensors begins.
OFFSETS = "DCP_SHARDING_INFO"


class Stored:
    """A tensor in the files of a checkpoint: slices of it are read when they are asked for, `[...]` is the whole."""

    def __init__(self) -> None:
        self._parts: list[tuple[list[int], Any]] = []

    def add(self, offset: list[int], view: Any) -> None:
        """A part, as safetensors' slices are, that begins at `offset`."""
        self._parts.append((offset, view))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        ends = [[o + n for o, n in zip(offset, view.get_shape(), strict=True)] for offset, view in self._parts]
        return tuple(map(max, zip(*ends, strict=True)))

    def __getitem__(self, key: Any) -> Tensor:
        """The values, in memory of their own; `key` is `...` or a slice of each dimension."""
        slices = [slice(None)] * len(self.shape) if key is ... else key
        wanted = [range(size)[one] for one, size in zip(slices, self.shape, strict=True)]
        found: Tensor | None = None
        for offset, view in self._parts:
            there = [range(o, o + n) for o, n in zip(offset, view.get_shape(), strict=True)]
            both = [range(max(w.start, t.start), min(w.stop, t.stop)) for w, t in zip(wanted, there, strict=True)]
            if not all(both):
                continue
            part = view[_within(both, there)] if both else view[...]
            if found is None:
                found = torch.empty([len(one) for one in wanted], dtype=part.dtype)
            found[_within(both, wanted)] = part
        return self._parts[0][1][...].new_empty([len(one) for one in wanted]) if found is None else found


def _within(parts: list[range], wholes: list[range]) -> tuple[slice, ...]:
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(parts, wholes, strict=True))


def read(path: Path, group: dict[str, Stored]) -> None:
    """Adds the tensors of a file, or parts of them, to a group by their names."""
    from safetensors import safe_open

    file = safe_open(path, "pt")
    offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
    for name in file.keys():  # noqa: SIM118  # not a mapping
        view = file.get_slice(name)
        start = offsets[name]["saved_offsets"] if name in offsets else [0] * len(view.get_shape())
        group.setdefault(name, Stored()).add(start, view)
