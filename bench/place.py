"""Where a run measures, whom it compares, and how it times."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .clocks import Clock, DeviceClock, HostClock, WallClock


@dataclass(frozen=True)
class Place:
    """One run's.

    Attributes:
        device: of all tensors.
        ours: contender -> backend of the RL ops.
        blocks: backend of the block ops; None on a CPU, where there is nothing of ours to time.
        elements: of a sample.
        compiler: of the compiled peer.
        rotation_bytes: the inputs of all sets together are at least this large, so that no cache holds what the next
            call reads.
        copy_bytes: size of a tensor of the copy.
        clock: for as many input sets as there are, times the contenders.
        host_clock: times what a call costs the host.
        dry: what is printed are no measurements.
    """

    device: torch.device
    ours: dict[str, str]
    blocks: str | None
    elements: tuple[int, ...]
    compiler: str
    rotation_bytes: int
    copy_bytes: int
    clock: Callable[[int], Clock]
    host_clock: Clock
    dry: bool = False

    @property
    def gpu(self) -> bool:
        """Whether the cases are the GPU's."""
        return self.blocks is not None


ELEMENTS = (16_384, 129_600, 806_400)


def _cpu() -> Place:
    """Our C++ kernels against torch on this CPU."""
    cpu, clock = torch.device("cpu"), WallClock()
    return Place(cpu, {"ours": "auto"}, None, ELEMENTS, "inductor", 192 << 20, 1 << 27, lambda sets: clock, clock)


def _cuda() -> Place:
    """Our CUDA and Triton kernels against torch on the current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    ours = {"ours, cuda": "cuda", "ours, triton": "triton"}
    rotation = 8 * torch.cuda.get_device_properties(device).L2_cache_size
    host = HostClock(torch.cuda.synchronize)
    # The copy is well beyond the second-level cache of any GPU.
    return Place(device, ours, "triton", ELEMENTS, "inductor", rotation, 1 << 29, DeviceClock, host)


def _dry() -> Place:
    """The GPU's run on a few CPU elements."""
    ours = {"ours, cuda": "cpu", "ours, triton": "reference"}
    cpu, clock, host = torch.device("cpu"), WallClock(), HostClock(lambda: None)
    few = (64, 1000)
    return Place(cpu, ours, "reference", few, "aot_eager", 1 << 16, 1 << 16, lambda sets: clock, host, True)


NAMES = ("cpu", "cuda", "dry")


@cache
def place_of(device: str) -> Place:
    """Of a value of `--device`."""
    return {"cpu": _cpu, "cuda": _cuda, "dry": _dry}[device]()
