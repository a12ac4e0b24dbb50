"""What CUDA's caching allocator says, read where phases begin and end."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Reading(NamedTuple):
    """Bytes of one phase: the most that was allocated and reserved; what lives at its end, by category."""

    allocated: int
    reserved: int
    resident: dict[str, int]


class Counters:
    """The allocator's peaks on one device; waits for the device at phase boundaries and nowhere else.

    Args:
        device: a CUDA device.
        snapshot: also read, at the end of every phase, which blocks live.
    """

    def __init__(self, device: torch.device, snapshot: bool = False) -> None:
        self.device, self.snapshot = device, snapshot

    def start(self) -> None:
        """A phase begins."""
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)

    def wait(self) -> None:
        """For the device to finish what was asked of it."""
        torch.cuda.synchronize(self.device)

    def stop(self, categories: Callable[[], Mapping[int, str]]) -> Reading:
        """A phase ended and the device is done with it; `categories` gives those of storages by their address."""
        return Reading(
            torch.cuda.max_memory_allocated(self.device),
            torch.cuda.max_memory_reserved(self.device),
            self._resident(categories()) if self.snapshot else {},
        )

    def _resident(self, categories: Mapping[int, str]) -> dict[str, int]:
        """Allocated blocks by the storage at their address; "workspace" has those without one, libraries' own."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        found: Counter[str] = Counter()
        for segment in torch.cuda.memory._snapshot(index)["segments"]:
            if segment["device"] != index:
                continue
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    found[categories.get(block["address"], "workspace")] += block["size"]
        return dict(found)
