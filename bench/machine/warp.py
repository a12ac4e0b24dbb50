"""What a warp holds: registers, predicates and memory, for each of its 32 lanes or unknown."""

from typing import Any

import numpy as np

from .code import Instruction, Operand

LANES = 32
Lanes = Any  # numpy array of 32 unsigned 64-bit numbers

_MASK = np.uint64(0xFFFFFFFF)
_SIGN = np.uint64(0x80000000)
_HIGH = np.uint64(32)
ONE = 0x3F800000
# Where a kernel's arguments begin in constant bank 0.
ARGUMENTS = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}
SHARED_WORDS = 1 << 16
_WIDTHS = {"64": 2, "128": 4}


class UnknownError(Exception):
    """A value that nothing here computed."""


def _same(value: int) -> Lanes:
    return np.full(LANES, value & 0xFFFFFFFF, dtype=np.uint64)


def signed(value: Lanes) -> Lanes:
    """32-bit words as signed numbers."""
    return value.astype(np.uint32).astype(np.int32).astype(np.int64)


def as_float(value: Lanes) -> Lanes:
    """32-bit words as float32."""
    return value.astype(np.uint32).view(np.float32)


def as_words(value: Lanes) -> Lanes:
    """float32 as words."""
    return np.asarray(value, dtype=np.float32).view(np.uint32).astype(np.uint64)


class Warp:
    """Registers, predicates and memory of one warp of a program."""

    def __init__(
        self, architecture: int, arguments: bytes, program: int, warp: int, threads: int, banks: dict[int, bytes]
    ):
        # Bits are set one by one in registers that nothing was written to before.
        self.registers: dict[str, list[Lanes | None]] = {kind: [_same(0)] * 256 for kind in ("R", "UR")}
        self.predicates: dict[str, list[Lanes | None]] = {"P": [None] * 8, "UP": [None] * 8}
        bank = bytearray(ARGUMENTS[architecture // 10]) + arguments
        first = 0 if architecture < 100 else 0x360
        bank[first : first + 4] = threads.to_bytes(4, "little")
        self.banks = {**banks, 0: bytes(bank)}
        self.special = {"SR_CTAID.X": _same(program), "SR_TID.X": np.arange(LANES, dtype=np.uint64) + warp * LANES}
        self.special["SR_LANEID"] = np.arange(LANES, dtype=np.uint64)
        self.shared = np.full(SHARED_WORDS, ONE, dtype=np.uint64)
        self.shared_bytes = np.zeros(4 * SHARED_WORDS, dtype=np.uint64)
        # A spilled word, by the lanes' common address.
        self.local: dict[int, Lanes] = {}
        self.take(np.ones(LANES, dtype=bool))

    def take(self, lanes: Lanes) -> None:
        """Those that what follows is for."""
        self.active: Lanes = lanes
        self.taking = int(np.count_nonzero(lanes))

    # Reading.

    def word(self, given: Operand, part: int = 0) -> Lanes:
        """An operand's 32 bits as they are stored, its sign not yet applied."""
        if given.kind in self.registers:
            if given.index < 0:
                return _same(0)
            value = self.registers[given.kind][given.index + part]
            if value is None:
                raise UnknownError
            return value
        if given.kind == "number":
            return _same(given.word if part == 0 else given.word >> 32 if given.word >= 0 else -1)
        if given.kind == "float":
            return _same(given.word)
        if given.kind == "constant":
            return self.constant(given, part)
        raise UnknownError

    def constant(self, given: Operand, part: int = 0, size: int = 4) -> Lanes:
        """Of the arguments, or of a table of jumps."""
        at = given.offset + 4 * part
        if given.word not in self.banks:
            raise UnknownError
        if given.parts:
            at += int(self.word(given.parts[0])[0])
        # What lies behind the arguments, as a stack pointer before them, is 0.
        return _same(int.from_bytes(self.banks[given.word][at : at + size], "little"))

    def integer(self, given: Operand) -> Lanes:
        """32 bits with the sign or inversion applied, as an unsigned number of 33 bits where negated."""
        value = self.word(given)
        if given.kind in ("number", "float"):
            return value
        if given.inverted:
            return value ^ _MASK
        return np.uint64(1 << 32) - value if given.negative else value

    def pair(self, given: Operand) -> Lanes:
        """64 bits: two registers; a number is extended by its sign."""
        if given.kind == "number":
            return np.full(LANES, given.word & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        if given.kind in self.registers and given.index < 0:
            return np.zeros(LANES, dtype=np.uint64)
        value = self.word(given) | self.word(given, 1) << _HIGH
        return (~value if given.inverted else np.uint64(0) - value) if given.negative or given.inverted else value

    def real(self, given: Operand, part: int = 0) -> Lanes:
        """float32; of a pair, one of the two."""
        value = as_float(self.word(given, 0 if given.kind in ("number", "float") else part))
        if given.kind in ("number", "float"):
            return value
        value = np.abs(value) if given.absolute else value
        return -value if given.negative else value

    def truth(self, given: Operand) -> Lanes:
        """A predicate."""
        if given.index < 0:
            value: Lanes = np.ones(LANES, dtype=bool)
        else:
            found = self.predicates[given.kind][given.index]
            if found is None:
                raise UnknownError
            value = found
        return ~value if given.inverted else value

    # Writing, in the lanes that take part.

    def put(self, given: Operand, value: Lanes | None, part: int = 0) -> None:
        """One register."""
        if given.index < 0 or given.kind not in self.registers:
            return
        file, index = self.registers[given.kind], given.index + part
        if value is None:
            file[index] = None
            return
        value = value & _MASK
        old = file[index]
        file[index] = value if self.taking == LANES or old is None else np.where(self.active, value, old)

    def put_pair(self, given: Operand, value: Lanes) -> None:
        """Two registers."""
        self.put(given, value)
        self.put(given, value >> _HIGH, 1)

    def put_truth(self, given: Operand, value: Lanes | None) -> None:
        """A predicate."""
        if given.index < 0 or given.kind not in self.predicates:
            return
        file = self.predicates[given.kind]
        old = file[given.index]
        whole = value is None or self.taking == LANES or old is None
        file[given.index] = value if whole else np.where(self.active, value, old)

    def address(self, given: Operand) -> Lanes:
        """Of an access to shared memory, in bytes."""
        total = np.full(LANES, given.offset, dtype=np.int64)
        for part in given.parts:
            total = total + self.word(part).astype(np.int64)
        return (total & 0xFFFF) % (4 * SHARED_WORDS)


def width_of(code: Instruction) -> int:
    """Bytes a lane moves."""
    for suffix, words in _WIDTHS.items():
        if suffix in code.suffixes:
            return 4 * words
    for suffix, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if suffix in code.suffixes:
            return size
    return 4
