"""What a device holds beside tensors: guesses, shown apart and never added to exact bytes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .settings import GIB, Settings

if TYPE_CHECKING:
    from .budget import Phase

# GiB. Contexts of 0.4 to 0.7, and NCCL's buffers of 0.6 to 2.3 were seen: `python -m bench.memory --only margins`.
CONTEXT, WORKSPACES, NCCL, UNTRACED = 0.6, 0.25, 1.5, 0.5
# Of what is allocated, what the allocator reserves beside it: with expandable segments, and without; in one process and
# under FSDP.
FRAGMENTATION = {True: 0.04, False: 0.13}
FRAGMENTATION_SHARDED = {True: 0.08, False: 0.27}


def fixed(settings: Settings) -> dict[str, int]:
    """Bytes that do not grow with what is allocated."""
    found = {"CUDA context": CONTEXT, "cuBLAS and cuDNN workspace": WORKSPACES}
    found |= {"NCCL": NCCL} if settings.fsdp > 1 else {}
    return {name: round(size * GIB) for name, size in found.items()}


def fragmentation(settings: Settings) -> float:
    """Of what is allocated, what is reserved beside it."""
    shares = FRAGMENTATION_SHARDED if settings.is_sharded else FRAGMENTATION
    return shares[settings.expandable_segments]


def margins(settings: Settings, exact: float) -> dict[str, int]:
    """Bytes beside a peak of `exact` bytes of tensors."""
    return fixed(settings) | {"fragmentation": round(fragmentation(settings) * exact)}


def with_margins(settings: Settings, exact: float) -> int:
    """`exact` bytes of tensors and what is held beside them."""
    return round(exact) + sum(margins(settings, exact).values())


def limit(settings: Settings, gib: float) -> float:
    """The most bytes of tensors that fit so many GiB."""
    return (gib * GIB - sum(fixed(settings).values())) / (1 + fragmentation(settings))


def untraced(phases: Iterable["Phase"]) -> dict[str, int]:
    """What text encoders and reward models need beside their weights, as far as it is above the peak of the rest."""
    sizes = {phase.name: phase.bytes for phase in phases}
    top = max(sizes.values())
    more = [sizes[name] + round(UNTRACED * GIB) - top for name in ("text encoding", "rewards") if name in sizes]
    return {"activations of models that are not traced": max(more)} if max(more, default=0) > 0 else {}
