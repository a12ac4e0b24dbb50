"""Blocks whose frozen weights wait on the host: what the device holds less, what streams, and how many `auto` takes.

As the trainer has it (`activations.streaming`): `blocks_to_swap` N lets N + 2 blocks pass through two buffers as large
as the largest of them. A call without gradients brings them all. In training the blocks that ran last are still there
when the direction turns, so that a forward brings N of them and its backward N. Copies overlap with work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...activations.streaming import BUFFERS, streamed_blocks
from .budget import Plan
from .settings import GIB, Settings

# Of an iteration's seconds, which are counted over assumed rates: what more blocks than have to must save.
WORTH = 0.02


@dataclass(frozen=True)
class Swap:
    """Bytes.

    Attributes:
        host: of the blocks that stream, in the order in which they run.
        blocks: how many the model has.
    """

    host: tuple[int, ...] = ()
    blocks: int = 0

    @property
    def buffer(self) -> int:
        """Of each one on the device."""
        return max(self.host, default=0)

    @property
    def saved(self) -> int:
        """That the device holds less."""
        return sum(self.host) - BUFFERS * self.buffer

    @property
    def rollout(self) -> int:
        """That a call without gradients brings."""
        return sum(self.host)

    @property
    def forward(self) -> int:
        """That a call with gradients brings: the first blocks are there from the backward before."""
        return sum(self.host[BUFFERS:])

    @property
    def backward(self) -> int:
        """That its backward brings: the last blocks are there."""
        return sum(self.host[:-BUFFERS])

    def reasons(self) -> list[str]:
        """In words, if anything waits."""
        if not self.host:
            return []
        count = len(self.host)
        return [
            f"blocks_to_swap {count - BUFFERS}: frozen weights of {count} of {self.blocks} blocks wait in"
            f" {sum(self.host) / GIB:.2f} GiB of page-locked host memory and pass through {BUFFERS} buffers of"
            f" {self.buffer / GIB:.2f} GiB; copies are assumed to overlap"
        ]


def swap_of(settings: Settings, streams: Sequence[int]) -> Swap:
    """What the settings mean for a model with blocks of so many frozen bytes.

    Raises:
        ValueError: more blocks than it can spare, or "auto", which is to be replaced before.
    """
    if settings.blocks_to_swap == 0:
        return Swap()
    if not isinstance(settings.blocks_to_swap, int):
        raise ValueError(f'blocks_to_swap: got "{settings.blocks_to_swap}", want a number here')
    return Swap(tuple(streams[i] for i in streamed_blocks(len(streams), settings.blocks_to_swap)), len(streams))


def choose(settings: Settings, blocks: int, host: bool, attempt: Callable[[Settings], Plan]) -> tuple[int, str]:
    """How many blocks "auto" swaps, and why: the fewest that fit, or more where the iteration is shorter.

    Args:
        settings: with "auto".
        blocks: of the model.
        host: block inputs may wait on the host.
        attempt: plans the settings with a number, and under "auto" one policy for all blocks.
    """
    most = blocks - BUFFERS
    smallest: dict[str, Any] = {}
    if settings.checkpointing == "auto":
        inputs = dict.fromkeys((*settings.offload, *(["block_inputs"] if host else [])))
        smallest = {"checkpointing": "full", "offload": tuple(inputs)}

    def fitting(count: int, **changes: Any) -> Plan | None:
        try:
            found = attempt(settings.changed(blocks_to_swap=count, **changes))
        except ValueError:
            # Weights alone are too much.
            return None
        return found if found.fits(settings.gpu_gib) else None

    if most < 1 or fitting(most, **smallest) is None:
        return max(0, most), "as many as can be, and it does not fit"
    # Where blocks differ in size, one or two may save less than the buffers take.
    low, high = (0, 0) if fitting(0, **smallest) is not None else (1, most)
    while low < high:
        middle = (low + high) // 2
        if fitting(middle, **smallest) is None:
            low = middle + 1
        else:
            high = middle
    # More leave more memory to keep what is computed again otherwise, until the link is what takes longest.
    seconds: dict[int, float] = {}
    step = 0
    while low + step <= most:
        found = fitting(low + step)
        if found is None or (seconds and found.seconds > min(seconds.values())):
            break
        seconds[low + step] = found.seconds
        if found.policy == "none":
            break
        step = most - low if low + 2 * step + 1 > most > low + step else 2 * step + 1
    best = min((n for n in seconds if seconds[n] * (1 - WORTH) <= min(seconds.values())), default=low)
    told = "; an iteration takes " + ", ".join(f"{found:.0f} s with {n}" for n, found in seconds.items())
    told += " under one policy for all blocks" if settings.checkpointing == "auto" else ""
    return best, f"{low} are the fewest that fit {settings.gpu_gib:.4g} GiB{told if seconds else ''}"
