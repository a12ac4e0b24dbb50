"""Measures what single operators of a device reach: copies, products, attention, launches and the link to the host."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .planning.cards import Rates
from .trace.tracer import measure as followed

# Of the time that is allowed, a share for each of them.
MEASURED = ("tflops", "attention_tflops", "bandwidth_gb_s", "pcie_gb_s", "launch_us")
# Seconds that calls between two looks at the clock take at least.
SPELL = 0.05


@dataclass(frozen=True)
class Sizes:
    """What is measured with, in bfloat16.

    Attributes:
        side: of square matrices.
        heads, tokens, width: of attention.
        bytes: of a copy.
        blocks: of the model whose operators are started.
    """

    side: int
    heads: int
    tokens: int
    width: int
    bytes: int
    blocks: int = 4


SIZES = {"cuda": Sizes(8192, 24, 8192, 128, 512 << 20), "cpu": Sizes(1024, 4, 1024, 64, 256 << 20)}


class _Block(nn.Module):
    """As many operators as a transformer block has, on next to no numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(self.first(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        made: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return made


class _Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(64) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.blocks(x)
        return made


def measure(
    device: torch.device, *, seconds: float = 20.0, link_gb_s: float | None = None, sizes: Sizes | None = None
) -> Rates:
    """What single operators reach; the median of as many calls as the time allows, after one that is not counted.

    On a CPU the link to the host is a copy in its memory.

    Args:
        device: a CPU or CUDA's.
        seconds: in all, about.
        link_gb_s: between devices, which is not measured; None: as the link to the host.
        sizes: what is measured with; None: `SIZES`.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return _measured(device, sizes or SIZES[device.type], seconds / len(MEASURED), link_gb_s)


def _measured(device: torch.device, sizes: Sizes, share: float, link: float | None) -> Rates:
    a, b = torch.randn(2, sizes.side, sizes.side, device=device, dtype=torch.bfloat16)
    products = 2 * sizes.side**3 / timed(lambda: a @ b, device, share)
    q, k, v = torch.randn(3, 1, sizes.heads, sizes.tokens, sizes.width, device=device, dtype=torch.bfloat16)
    work = 4 * sizes.heads * sizes.tokens**2 * sizes.width
    attended = work / timed(lambda: F.scaled_dot_product_attention(q, k, v), device, share)
    copied = 2 * sizes.bytes / _copying(sizes.bytes, device, device, share)
    if device.type == "cuda":
        host = torch.device("cpu")
        linked = sizes.bytes / max(_copying(sizes.bytes, *ends, share / 2) for ends in ((host, device), (device, host)))
    else:
        linked = copied / 2
    starting = 1e6 * _starting(sizes, device, share)
    return Rates(
        tflops=products / 1e12,
        attention_tflops=attended / 1e12,
        bandwidth_gb_s=copied / 1e9,
        pcie_gb_s=linked / 1e9,
        link_gb_s=link or linked / 1e9,
        launch_us=starting,
    )


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of a call, the median of spells of many; at least one spell is measured."""
    spell, count = 0.0, 1
    call()
    while True:
        spell = _spell(call, device, count)
        if spell >= min(SPELL, seconds):
            break
        count *= 2
    found = [spell / count]
    until = time.perf_counter() + seconds - 2 * spell
    while time.perf_counter() < until:
        found.append(_spell(call, device, count) / count)
    return statistics.median(found)


def _spell(call: Callable[[], object], device: torch.device, count: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copying(size: int, start: torch.device, end: torch.device, seconds: float) -> float:
    """Seconds of a copy; memory of the host is pinned where a GPU is at the other end."""
    pinned = start.type != end.type
    source, target = (
        torch.ones(size, dtype=torch.uint8, device=at, pin_memory=pinned and at.type == "cpu") for at in (start, end)
    )
    return timed(lambda: target.copy_(source, non_blocking=True), end if end.type == "cuda" else start, seconds)


def _starting(sizes: Sizes, device: torch.device, seconds: float) -> float:
    """Seconds of the host for an operator of a small model's forward and backward."""
    model = _Model(sizes.blocks).to(device, torch.bfloat16)
    x = torch.randn(1, 16, 64, device=device, dtype=torch.bfloat16)
    launches = followed(_Model(sizes.blocks), {"x": torch.randn(1, 16, 64)}).launches
    count = sum(launches[phase] for phase in ("forward", "backward"))

    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        model(x).sum().backward()
        # What waits in the device's queue is not the host's time.
        return time.perf_counter() - start

    once()
    found, until = [once()], time.perf_counter() + seconds
    while time.perf_counter() < until:
        found.append(once())
    return statistics.median(found) / count
