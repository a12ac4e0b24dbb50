"""One warp's way through machine code: which instructions it issues, and how often.

Integers, addresses, predicates and plain float32 are computed for each of the 32 lanes, so loops and branches go where
the launch's arguments send them. Memory that the warp did not write reads as 1.0f in whole words and as 0 in bytes,
an atomic as 0. What an opcode unknown here writes is unknown, and a branch that asks for it is an error.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .code import Instruction, Operand
from .semantics import run
from .warp import LANES, Lanes, UnknownError, Warp, signed, width_of

# Tolerates a loop of a few thousand tokens; a branch that never ends is found soon enough.
LIMIT = 4_000_000
_JUMPS = frozenset(("BRA", "CALL", "RET", "BRX", "BRXU"))


class Issued:
    """What a warp issued: instructions, their units, and bytes it asked of global memory."""

    def __init__(self) -> None:
        self.instructions = 0
        self.units: Counter[str] = Counter()
        self.bytes = 0

    def add(self, code: Instruction, lanes: int) -> None:
        """One instruction."""
        self.instructions += 1
        self.units[code.unit] += 1
        if code.base in ("LDG", "STG", "LD", "ST", "LDGSTS"):
            self.bytes += lanes * (16 if code.base == "LDGSTS" and "128" in code.suffixes else width_of(code))


def _targets(code: Instruction) -> list[Operand]:
    """What an instruction may write."""
    found: list[Operand] = []
    for given in code.operands:
        if given.kind in ("P", "UP"):
            found.append(given)
            continue
        if given.kind in ("R", "UR"):
            found.append(given)
        break
    return found


def forget(warp: Warp, code: Instruction) -> None:
    """What the instruction writes is unknown."""
    wide = 4 if "128" in code.suffixes else 2 if {"64", "WIDE"} & code.suffixes or code.base[0] == "D" else 1
    wide = (
        2 if code.base in ("FADD2", "FMUL2", "FFMA2", "CS2R") or code.name.startswith(("F2F.F64", "I2F.F64")) else wide
    )
    for given in _targets(code):
        if given.kind in ("P", "UP"):
            warp.put_truth(given, None)
        for part in range(wide if given.kind in ("R", "UR") else 0):
            warp.put(given, None, part)


def follow(code: Sequence[Instruction], warp: Warp) -> Issued:
    """Runs the warp to its end; lanes that parted wait for those with the lowest address, where they meet again.

    Raises:
        UnknownError: a branch depends on what is not computed here.
    """
    at = {one.address: index for index, one in enumerate(code)}
    # Lanes by where they are.
    waiting: dict[int, Lanes] = {0: np.ones(LANES, dtype=bool)}
    issued = Issued()

    def go(place: int, lanes: Lanes) -> None:
        waiting[place] = waiting[place] | lanes if place in waiting else lanes

    while waiting:
        here = min(waiting)
        group = waiting.pop(here)
        one = code[here]
        taking = group
        if one.guard is not None:
            try:
                taking = group & warp.truth(one.guard)
            except UnknownError:
                if one.base == "EXIT" or one.base in _JUMPS:
                    raise UnknownError(f"{one.address:#x} {one.name}: its guard") from None
                warp.take(group)
                issued.add(one, warp.taking)
                forget(warp, one)
                go(here + 1, group)
                continue
        warp.take(taking)
        issued.add(one, warp.taking)
        if issued.instructions > LIMIT:
            raise UnknownError(f"{one.address:#x} {one.name}: no end after {LIMIT} instructions")
        if one.base == "EXIT" or one.base in _JUMPS:
            left = group
            for address, lanes in _leaving(one, warp, code[here + 1].address if one.base != "EXIT" else 0):
                left = left & ~lanes
                if address >= 0:
                    go(at[address], lanes)
            if np.count_nonzero(left):
                go(here + 1, left)
            continue
        go(here + 1, group)
        if warp.taking:
            try:
                with np.errstate(all="ignore"):
                    run(warp, one)
            except UnknownError:
                forget(warp, one)
    return issued


def _leaving(one: Instruction, warp: Warp, next_address: int) -> list[tuple[int, Lanes]]:
    """The addresses where lanes go, -1 for the end, and which of them."""
    taking = warp.active
    if not warp.taking:
        return []
    if one.base == "EXIT":
        return [(-1, taking)]
    try:
        for given in one.operands:
            if given.kind in ("P", "UP"):
                taking = taking & warp.truth(given)
        if one.base in ("BRA", "CALL"):
            return [(one.target, taking)] if np.count_nonzero(taking) else []
        # Returns are relative to the function, jumps by a table to the next instruction.
        start = one.target if one.base == "RET" else next_address + one.target
        to = signed(warp.word(one.operands[0])) + start
        return [(int(address), taking & (to == address)) for address in np.unique(to[taking])]
    except UnknownError:
        raise UnknownError(f"{one.address:#x} {one.name}: where to") from None
