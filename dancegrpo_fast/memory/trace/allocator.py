"""What torch's caching allocator on CUDA would hold for a trace's storages: bytes reserved, not only allocated.

Sizes are rounded and blocks split, reused and joined as the allocator does (c10/cuda/CUDACachingAllocator.cpp), on one
stream, beginning with nothing. Where a card has no more, the real one gives free segments back and asks again, so that
a step may fit in less than this.
"""

import bisect

from .result import Trace

MIB = 2**20
# Requests up to SMALL share segments of 2 MiB, those below LARGE segments of 20 MiB; others have their own.
SMALL, LARGE = MIB, 10 * MIB


class _Block:
    """A part of a segment, with its neighbours there."""

    __slots__ = ("after", "before", "free", "size", "small")

    def __init__(self, size: int, small: bool, before: "_Block | None" = None, after: "_Block | None" = None) -> None:
        self.size, self.small, self.before, self.after, self.free = size, small, before, after, False


class _Pool:
    """All segments; free blocks by size."""

    def __init__(self) -> None:
        self.reserved = 0
        self.idle: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._count = 0

    def _rest(self, block: _Block) -> None:
        block.free = True
        self._count += 1
        bisect.insort(self.idle[block.small], (block.size, self._count, block))

    def _take(self, block: _Block) -> None:
        block.free = False
        idle = self.idle[block.small]
        place = bisect.bisect_left(idle, (block.size, 0))
        while idle[place][2] is not block:
            place += 1
        del idle[place]

    def allocate(self, wanted: int) -> _Block:
        size = max(512, -(-wanted // 512) * 512)
        small = size <= SMALL
        idle = self.idle[small]
        place = bisect.bisect_left(idle, (size, 0))
        if place < len(idle):
            block = idle[place][2]
            self._take(block)
        else:
            segment = 2 * MIB if small else 20 * MIB if size < LARGE else -(-size // (2 * MIB)) * 2 * MIB
            block = _Block(segment, small)
            self.reserved += segment
        rest = block.size - size
        if rest >= 512 if small else rest > SMALL:
            part = _Block(rest, small, block, block.after)
            if block.after is not None:
                block.after.before = part
            block.size, block.after = size, part
            self._rest(part)
        return block

    def release(self, block: _Block) -> None:
        if block.after is not None and block.after.free:
            self._take(block.after)
            block = _joined(block, block.after)
        if block.before is not None and block.before.free:
            self._take(block.before)
            block = _joined(block.before, block)
        self._rest(block)


def _joined(block: _Block, after: _Block) -> _Block:
    block.size += after.size
    block.after = after.after
    if block.after is not None:
        block.after.before = block
    return block


def reserved_bytes(found: Trace) -> int:
    """Of all phases together; nothing is given back between them."""
    pool, blocks = _Pool(), {}
    for sign, storage in found.changes:
        if not storage.size:
            continue
        if sign > 0:
            blocks[id(storage)] = pool.allocate(storage.size)
        else:
            pool.release(blocks.pop(id(storage)))
    return pool.reserved
