"""Timesteps of a diffusers flow-matching scheduler as rows of a table."""

from typing import Any

import torch
from torch import Tensor

from ._common import cached


def find_steps(scheduler: Any, timestep: Any, device: torch.device) -> tuple[int | Tensor, int]:
    """The index of every timestep in the scheduler's, and how many there are.

    The scheduler's are read once, timesteps on a device never. One number where all are the same and known on the
    host, else int64 `[K]` on `device`. Of a timestep that is there twice diffusers takes the second.

    Raises:
        ValueError: a timestep that is not in the schedule (CUDA tensors fail a device-side assertion instead).
    """
    times = scheduler.timesteps
    known = cached("self.timesteps", times, "indices", _indices)
    if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
        return _found_on_device(times, timestep.reshape(-1), len(known) < len(times), device), timestep.numel()
    if not isinstance(timestep, Tensor):  # torch compares a Python number in the tensor's dtype
        dtype = times.dtype if times.is_floating_point() else None
        timestep = torch.as_tensor(timestep, dtype=dtype, device="cpu")
    wanted = timestep.reshape(-1).tolist()
    found = [known.get(time, -1) for time in wanted]
    if -1 in found:
        raise ValueError(f"timestep: got {wanted}, want some of the scheduler's, {times.tolist()}")
    return (found[0] if len(set(found)) == 1 else torch.tensor(found, device=device)), len(found)


def _indices(times: Tensor) -> dict[float, int]:
    found: dict[float, list[int]] = {}
    for index, time in enumerate(times.tolist()):
        found.setdefault(time, []).append(index)
    return {time: places[min(1, len(places) - 1)] for time, places in found.items()}


def _found_on_device(times: Tensor, wanted: Tensor, repeated: bool, device: torch.device) -> Tensor:
    beside = cached("self.timesteps", times, wanted.device, lambda values: values.to(wanted.device))
    matches = wanted[:, None] == beside
    require(matches.any(dim=1).all(), lambda: "timestep: want some of the scheduler's")
    if repeated:
        matches = matches & (matches.cumsum(1) == matches.sum(1, keepdim=True).clamp(max=2))
    return matches.to(torch.int64).argmax(dim=1).to(device)


def require(condition: Tensor, message: Any) -> None:
    """ValueError of `message()` unless the 0-dim tensor is true, which a CUDA tensor is asked on its device."""
    if condition.device.type != "cpu":
        torch._assert_async(condition)
    elif not bool(condition):
        raise ValueError(message())
