"""Whether all that is saved are numbers."""

from collections.abc import Mapping
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from ..processes import Processes
from ..shards import local


def check_finite(
    groups: Mapping[str, Mapping[str, Tensor]], processes: Processes, iteration: int, newest: Path | None
) -> None:
    """Looks at every value where it lies, and waits for the device once; of every process.

    Args:
        groups: tensors by name, by what they are; those that hold no floats are passed over.
        processes: of the run.
        iteration: that has made them.
        newest: checkpoint before it.

    Raises:
        RuntimeError: some are not finite; in every process.
    """
    parts = {
        f"{group} {name}": local(value.detach())
        for group, values in groups.items()
        for name, value in values.items()
        if value.is_floating_point()
    }
    # One value that is no number makes the largest magnitude none. Of a sharded tensor a process may have nothing.
    largest = [torch.linalg.vector_norm(one, inf) if one.numel() else one.new_zeros(()) for one in parts.values()]
    found = torch.stack([one.to(processes.device, torch.float64) for one in largest])
    # A maximum over processes may lose what is not a number.
    everywhere = processes.max(found.nan_to_num(nan=inf, posinf=inf)).tolist()
    bad = [name for name, one in zip(parts, everywhere, strict=True) if one == inf]
    if bad:
        more = f" and {len(bad) - 1} more of {len(parts)} tensors are" if len(bad) > 1 else " is"
        raise RuntimeError(
            f"iteration {iteration}: {bad[0]}{more} not finite, and nothing of it is saved; the last checkpoint is "
            f"{newest or 'none'}"
        )
