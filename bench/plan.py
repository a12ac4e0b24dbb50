"""Where a run measures, what it compares, and how it times."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dancegrpo_fast import backends

from .clocks import Clock, DeviceClock, HostClock, WallClock
from .harness import COPY_BYTES, DEVICE_COPY_BYTES

ELEMENTS = (16_384, 129_600, 806_400)
OPS = ("step", "step_given_noise", "policy_loss")
GPU_OPS = ("step", "step_given_noise", "log_prob", "policy_loss")


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        device: of all tensors.
        implementations: contender -> backend of our ops.
        missing: contender -> why it is not among them.
        ops, elements: what is measured.
        bfloat16: a quick run has the largest case in it as well.
        compiler: of the compiled peer.
        variants: also our step that writes x0, and with noise drawn by torch.
        rotation_bytes: the inputs of all sets together are at least this large, so that no cache holds what the next
            call reads.
        copy_bytes: size of a tensor of the copy.
        clock: for as many input sets as there are, times the contenders.
        host_clock: times what a call costs the host.
    """

    device: torch.device
    implementations: dict[str, str]
    missing: dict[str, str]
    ops: tuple[str, ...]
    elements: tuple[int, ...]
    bfloat16: bool
    compiler: str
    variants: bool
    rotation_bytes: int
    copy_bytes: int
    clock: Callable[[int], Clock]
    host_clock: Clock


def cpu_plan() -> Plan:
    """Our C++ kernels against torch on this CPU."""
    ours, cpu = {"ours": "auto"}, torch.device("cpu")
    clock = WallClock()
    return Plan(cpu, ours, {}, OPS, ELEMENTS, False, "inductor", True, 192 << 20, COPY_BYTES, lambda sets: clock, clock)


def gpu_plan() -> Plan:
    """Our CUDA and Triton kernels against torch on the current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    found = {b.name: b for b in backends.available() if b.name in ("cuda", "triton")}
    ours = {f"ours, {name}": name for name, b in found.items() if b.available}
    missing = {f"ours, {name}": b.detail for name, b in found.items() if not b.available}
    rotation = 8 * torch.cuda.get_device_properties(device).L2_cache_size
    host = HostClock(torch.cuda.synchronize)
    return Plan(
        device,
        ours,
        missing,
        GPU_OPS,
        ELEMENTS,
        True,
        "inductor",
        False,
        rotation,
        DEVICE_COPY_BYTES,
        DeviceClock,
        host,
    )


def dry_plan() -> Plan:
    """The GPU's run on a few CPU elements: what it prints are no measurements."""
    stand_ins = {"ours, cuda": "cpu", "ours, triton": "reference"}
    cpu, clock = torch.device("cpu"), WallClock()
    host = HostClock(lambda: None)
    return Plan(
        cpu, stand_ins, {}, GPU_OPS, (64, 1000), True, "aot_eager", False, 1 << 16, 1 << 16, lambda sets: clock, host
    )


PLANS = {"cpu": cpu_plan, "cuda": gpu_plan, "dry": dry_plan}
