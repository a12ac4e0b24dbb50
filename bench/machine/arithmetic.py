"""What opcodes on integers and predicates compute."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .code import Instruction, Operand
from .warp import LANES, Lanes, Warp, as_words, signed

ALL = np.uint64(0xFFFFFFFF)
_FULL = np.uint64(0xFFFFFFFFFFFFFFFF)
_HIGH = np.uint64(32)
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


def plain(given: list[Operand]) -> list[Operand]:
    """Operands that are no predicates."""
    return [o for o in given if o.kind not in ("P", "UP")]


def predicates(given: list[Operand]) -> list[Operand]:
    """Those that are."""
    return [o for o in given if o.kind in ("P", "UP")]


def carry_in(w: Warp, given: list[Operand]) -> Lanes:
    """What is carried in."""
    total = np.zeros(LANES, dtype=np.uint64)
    for one in predicates(given):
        total = total + w.truth(one).astype(np.uint64)
    return total


def put_carries(w: Warp, outs: list[Operand], total: Lanes) -> None:
    """Writes what is carried out."""
    for number, out in enumerate(outs, 1):
        w.put_truth(out, total >> _HIGH >= np.uint64(number))


def add(w: Warp, code: Instruction) -> None:
    """Sums of two or three words, or of pairs."""
    outs, target, given = code.parts
    if "64" in code.suffixes:
        total = np.zeros(LANES, dtype=np.uint64)
        for one in plain(given):
            total = total + w.pair(one)
        w.put_pair(target, total)
        return
    total = carry_in(w, given) if "X" in code.suffixes else np.zeros(LANES, dtype=np.uint64)
    for one in plain(given):
        total = total + w.integer(one)
    w.put(target, total)
    put_carries(w, outs, total)


def multiply(w: Warp, code: Instruction) -> None:
    """Products and a sum."""
    outs, target, given = code.parts
    a, b, c = plain(given)
    unsigned = "U32" in code.suffixes
    if {"WIDE", "HI"} & code.suffixes:
        x, y = (w.word(o) if unsigned else signed(w.word(o)).astype(np.uint64) for o in (a, b))
        x = np.uint64(0) - x if a.negative and a.kind != "number" else x
        y = np.uint64(0) - y if b.negative and b.kind != "number" else y
        product = x * y
        added = w.pair(c) if c.kind != "constant" else w.word(c) | w.word(c, 1) << _HIGH
        total = product + added
        if "HI" in code.suffixes:
            w.put(target, total >> _HIGH)
            return
        w.put_pair(target, total)
        for out in outs[:1]:
            w.put_truth(out, total < product)
        return
    product = (w.integer(a) * w.integer(b)) & ALL
    total = product + w.integer(c) + (carry_in(w, given) if "X" in code.suffixes else np.uint64(0))
    w.put(target, total)
    put_carries(w, outs, total)


def lea(w: Warp, code: Instruction) -> None:
    """A shifted word and another."""
    outs, target, given = code.parts
    *numbers, shift = plain(given)
    bits = w.word(shift)
    high = "HI" in code.suffixes
    if not high:
        moved = (w.word(numbers[0]) << bits) & ALL
    elif "SX32" in code.suffixes:
        moved = (signed(w.word(numbers[0])).astype(np.uint64) << bits) >> _HIGH
    else:
        both = w.word(numbers[0]) | (w.word(numbers[2]) if len(numbers) > 2 else np.uint64(0)) << _HIGH
        moved = (both << bits) >> _HIGH
    moved = moved & ALL
    moved = (np.uint64(1 << 32) - moved) & ALL if numbers[0].negative else moved
    total = moved + w.integer(numbers[1])
    if "X" in code.suffixes or "SX32" in code.suffixes:
        total = total + carry_in(w, given)
    w.put(target, total)
    put_carries(w, outs, total)


def shift(w: Warp, code: Instruction) -> None:
    """Of one word, or of two as one."""
    _, target, given = code.parts
    low, by, high = given
    both = w.word(low) | w.word(high) << _HIGH
    bits = np.minimum(w.word(by), np.uint64(63))
    wide = {"U64", "S64"} & code.suffixes
    if "L" in code.suffixes:
        moved = (both << bits) & _FULL if wide or "HI" in code.suffixes else w.word(low) << bits
        w.put(target, moved >> _HIGH if "HI" in code.suffixes else moved)
        return
    if {"S32", "S64"} & code.suffixes:
        moved = (both.astype(np.int64) >> bits.astype(np.int64)).astype(np.uint64)
    else:
        moved = both >> bits
    w.put(target, moved >> _HIGH if "HI" in code.suffixes else moved)


def by_table(a: Lanes, b: Lanes, c: Lanes, table: int) -> Lanes:
    """A function of three bits by its table of truths."""
    out = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            out = out | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def logic(w: Warp, code: Instruction) -> None:
    """LOP3."""
    outs, target, given = code.parts
    a, b, c, table = plain(given)
    value = by_table(w.integer(a), w.integer(b), w.integer(c), table.word) & ALL
    w.put(target, value)
    for out in outs:
        w.put_truth(out, value != 0)


def predicate_logic(w: Warp, code: Instruction) -> None:
    """PLOP3."""
    first, second, a, b, c, table, other = code.operands
    for out, rule in ((first, table), (second, other)):
        if out.index >= 0:
            w.put_truth(out, by_table(w.truth(a), w.truth(b), w.truth(c), rule.word))


def compare(w: Warp, code: Instruction) -> None:
    """ISETP."""
    first, second, a, b, *rest = code.operands
    kind = next(s for s in code.name.split(".") if s in COMPARE)
    if {"S64", "U64"} & code.suffixes:
        x, y = w.pair(a), w.pair(b)
        x, y = (x, y) if "U64" in code.suffixes else (x.astype(np.int64), y.astype(np.int64))
    elif "U32" in code.suffixes:
        x, y = w.integer(a) & ALL, w.integer(b) & ALL
    else:
        x, y = signed(w.integer(a) & ALL), signed(w.integer(b) & ALL)
    result = COMPARE[kind](x, y)
    if "EX" in code.suffixes:
        low = w.truth(rest[1])
        if kind == "NE":
            result = result | low
        elif kind == "EQ":
            result = result & low
        else:
            result = COMPARE["LT" if kind[0] == "L" else "GT"](x, y) | (x == y) & low
    put_comparison(w, code, first, second, result, rest[0])


def put_comparison(w: Warp, code: Instruction, first: Operand, second: Operand, result: Lanes, by: Operand) -> None:
    """A comparison joined with another predicate, and its opposite."""
    other = w.truth(by)
    join = np.logical_or if "OR" in code.suffixes else np.logical_and
    w.put_truth(first, join(result, other))
    w.put_truth(second, join(~result, other))


def select(w: Warp, code: Instruction) -> None:
    """One of two by a predicate."""
    _, target, (a, b, by) = code.parts
    if "64" in code.suffixes:
        w.put_pair(target, np.where(w.truth(by), w.pair(a), w.pair(b)))
        return
    if code.base.endswith("FSEL"):
        x, y = as_words(w.real(a)), as_words(w.real(b))
    else:
        x, y = w.integer(a), w.integer(b)
    w.put(target, np.where(w.truth(by), x, y))


def move(w: Warp, code: Instruction) -> None:
    """A word or a pair."""
    _, target, given = code.parts
    if "64" in code.suffixes:
        w.put_pair(target, w.pair(given[0]))
    else:
        w.put(target, w.integer(given[0]))


def extreme(w: Warp, code: Instruction) -> None:
    """The least or the largest."""
    _, target, given = code.parts
    least = w.truth(predicates(given)[-1])
    if "S64" in code.suffixes:
        x, y = (w.pair(o).astype(np.int64) for o in plain(given))
        w.put_pair(target, np.where(least, np.minimum(x, y), np.maximum(x, y)).astype(np.uint64))
        return
    read = [w.integer(o) & ALL for o in plain(given)]
    numbers = read if "U32" in code.suffixes else [signed(o) for o in read]
    if code.base == "VIADDMNMX":
        numbers = [numbers[0] + numbers[1], numbers[2]]
    value = numbers[0]
    for other in numbers[1:]:
        value = np.where(least, np.minimum(value, other), np.maximum(value, other))
    w.put(target, value.astype(np.uint64))


def permute(w: Warp, code: Instruction) -> None:
    """Bytes of two words."""
    _, target, (a, choice, c) = code.parts
    both = w.word(a) | w.word(c) << _HIGH
    picks = w.word(choice)
    value = np.zeros(LANES, dtype=np.uint64)
    if choice.kind == "number" and not choice.word & 0x8888:
        for i in range(4):
            value |= (both >> np.uint64(8 * (choice.word >> 4 * i & 7)) & np.uint64(0xFF)) << np.uint64(8 * i)
        w.put(target, value)
        return
    for i in range(4):
        pick = picks >> np.uint64(4 * i)
        byte = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        byte = np.where(pick & np.uint64(8), np.where(byte & np.uint64(0x80), 0xFF, 0), byte).astype(np.uint64)
        value = value | byte << np.uint64(8 * i)
    w.put(target, value)


def extend(w: Warp, code: Instruction) -> None:
    """The low bits of a word."""
    _, target, (given, bits) = code.parts
    count = np.uint64(bits.word)
    value = w.word(given) & (np.uint64(1) << count) - np.uint64(1)
    if "U32" not in code.suffixes:
        value = np.where(value >> count - np.uint64(1) & np.uint64(1) == 1, value | ~np.uint64(0) << count, value)
    w.put(target, value)


def absolute(w: Warp, code: Instruction) -> None:
    """IABS."""
    _, target, (given,) = code.parts
    w.put(target, np.abs(signed(w.word(given))).astype(np.uint64))
