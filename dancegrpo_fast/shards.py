"""Tensors that FSDP2 splits: this process's part of one, and the whole."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def whole(value: Tensor) -> Tensor:
    """A tensor with the parts of every process, on each of them."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def is_shard(value: Tensor) -> bool:
    """Whether it is a process's part of a tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def shard(value: Tensor) -> tuple[Tensor, Sequence[int]]:
    """This process's part of a tensor, and where it begins in the whole."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(value, DTensor):
        return value, [0] * value.ndim
    return value.to_local(), compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)[1]


def like(value: Any, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter is: on its device, and split as it is.

    Args:
        value: it, or what gives parts of it when sliced; of a split parameter only this process's are asked for.
        parameter: of the same shape.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        whole: Tensor = value[...].to(parameter.device)
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    part = value[tuple(slice(start, start + size) for size, start in zip(sizes, offsets, strict=True))]
    there = part.contiguous().to(parameter.device)
    return DTensor.from_local(there, mesh, placements, shape=parameter.shape, stride=parameter.stride())
