"""What opcodes compute, as far as the way through the code depends on it."""

from collections.abc import Callable

import numpy as np

from . import arithmetic
from .arithmetic import ALL, COMPARE, plain, put_comparison
from .code import Instruction, Operand
from .warp import LANES, ONE, Lanes, UnknownError, Warp, as_words, signed, width_of

# Waits, barriers and markers write nothing.
_NOTHING = frozenset(
    (
        "NOP",
        "BSSY",
        "BSYNC",
        "BAR",
        "WARPSYNC",
        "MEMBAR",
        "ERRBAR",
        "CGAERRBAR",
        "CCTL",
        "YIELD",
        "DEPBAR",
        "LDGDEPBAR",
        "LDGSTS",
        "STG",
        "ST",
        "BREAK",
    )
)


def _compare_real(w: Warp, code: Instruction) -> None:
    first, second, a, b, *rest = code.operands
    kind = next(s for s in code.name.split(".")[1:] if s not in ("FTZ", "AND", "OR"))
    x, y = w.real(a), w.real(b)
    unordered = np.isnan(x) | np.isnan(y)
    if kind == "NAN":
        result = unordered
    elif kind == "NUM":
        result = ~unordered
    elif kind.endswith("U") and kind[:-1] in COMPARE:
        result = COMPARE[kind[:-1]](x, y) | unordered
    else:
        result = COMPARE[kind](x, y) & ~unordered
    put_comparison(w, code, first, second, result, rest[0])


def _extreme_real(w: Warp, code: Instruction) -> None:
    _, target, (a, b, by) = code.parts
    x, y = w.real(a), w.real(b)
    w.put(target, as_words(np.where(w.truth(by), np.minimum(x, y), np.maximum(x, y))))


def _real(w: Warp, code: Instruction) -> None:
    _, target, given = code.parts
    kind = code.base.lstrip("U")
    results = []
    for part in range(2 if kind.endswith("2") else 1):
        numbers = [w.real(o, part) for o in given]
        if kind.startswith("FADD"):
            value = numbers[0] + numbers[1]
        elif kind.startswith("FMUL"):
            value = numbers[0] * numbers[1]
        else:
            value = (numbers[0].astype(np.float64) * numbers[1] + numbers[2]).astype(np.float32)
        results.append(as_words(value))
    for part, value in enumerate(results):
        w.put(target, value, part)


def _function(w: Warp, code: Instruction) -> None:
    _, target, given = code.parts
    functions: dict[str, Callable[[Lanes], Lanes]] = {
        "RCP": lambda x: np.float32(1) / x,
        "RSQ": lambda x: np.float32(1) / np.sqrt(x),
        "SQRT": np.sqrt,
        "EX2": np.exp2,
        "LG2": np.log2,
    }
    kind = code.name.split(".")[1]
    if kind not in functions:
        raise UnknownError
    w.put(target, as_words(functions[kind](w.real(given[0]))))


def _from_integer(w: Warp, code: Instruction) -> None:
    _, target, (given,) = code.parts
    if "F64" in code.suffixes:
        raise UnknownError
    if {"U64", "S64"} & code.suffixes:
        exact = w.pair(given) if "U64" in code.suffixes else w.pair(given).astype(np.int64)
    else:
        exact = w.integer(given) & ALL
        exact = exact if "U32" in code.suffixes else signed(exact)
    value = exact.astype(np.float32)
    if "RP" in code.suffixes:
        below = value.astype(np.float64) < exact.astype(np.float64)
        value = np.where(below, np.nextafter(value, np.float32(np.inf)), value)
    w.put(target, as_words(value))


def _to_integer(w: Warp, code: Instruction) -> None:
    _, target, (given,) = code.parts
    if "F64" in code.suffixes:
        raise UnknownError
    value = np.trunc(w.real(given).astype(np.float64))
    if {"U64", "S64"} & code.suffixes:
        w.put_pair(target, np.clip(value, 0, 2.0**63).astype(np.uint64))
    else:
        w.put(target, np.clip(value, 0, 2.0**32 - 1).astype(np.uint64))


def _load(w: Warp, code: Instruction) -> None:
    outs, target, _ = code.parts
    size = width_of(code)
    for out in outs:
        w.put_truth(out, np.zeros(LANES, dtype=bool))
    for part in range(max(1, size // 4)):
        w.put(target, np.full(LANES, {1: 0, 2: ONE >> 16}.get(size, ONE), dtype=np.uint64), part)


def _load_shared(w: Warp, code: Instruction) -> None:
    _, target, (given,) = code.parts
    size, where = width_of(code), w.address(given)
    if size == 1:
        w.put(target, w.shared_bytes[where])
        return
    for part in range(max(1, size // 4)):
        w.put(target, w.shared[(where // 4 + part)], part)


def _store_shared(w: Warp, code: Instruction) -> None:
    to, given = code.operands
    size, where = width_of(code), w.address(to)[w.active]
    if size == 1:
        w.shared_bytes[where] = w.word(given)[w.active]
        return
    for part in range(max(1, size // 4)):
        w.shared[where // 4 + part] = w.word(given, part)[w.active]


def _load_local(w: Warp, code: Instruction) -> None:
    _, target, (given,) = code.parts
    at = int(w.address(given)[0])
    for part in range(width_of(code) // 4):
        w.put(target, w.local.get(at + 4 * part), part)


def _store_local(w: Warp, code: Instruction) -> None:
    to, given = code.operands
    at = int(w.address(to)[0])
    for part in range(width_of(code) // 4):
        w.local[at + 4 * part] = w.word(given, part)


def _constant(w: Warp, code: Instruction) -> None:
    _, target, (given,) = code.parts
    size = width_of(code)
    if size < 4:
        w.put(target, w.constant(given, 0, size))
    for part in range(size // 4):
        w.put(target, w.constant(given, part), part)


def _special(w: Warp, code: Instruction) -> None:
    _, target, _ = code.parts
    w.put(target, w.special.get(code.special, np.zeros(LANES, dtype=np.uint64)))
    if code.base == "CS2R" and "32" not in code.suffixes:
        w.put(target, np.zeros(LANES, dtype=np.uint64), 1)


def _to_uniform(w: Warp, code: Instruction) -> None:
    _, target, given = code.parts
    value = w.integer(plain(given)[0])
    w.put(target, np.full(LANES, value[np.argmax(w.active)], dtype=np.uint64))


def _vote(w: Warp, code: Instruction) -> None:
    *outs, by = code.operands
    votes = w.truth(by) & w.active
    every = "ALL" in code.suffixes
    for out in outs:
        if out.kind in ("P", "UP"):
            w.put_truth(out, np.full(LANES, (votes == w.active).all() if every else votes.any()))
        else:
            w.put(out, np.full(LANES, sum(1 << i for i in range(LANES) if votes[i]), dtype=np.uint64))


def _half_constant(w: Warp, code: Instruction) -> None:
    _, target, given = code.parts
    if len(given) != 4 or given[0].index != -1 or given[1].index != -1 or given[2].kind not in ("float", "number"):
        raise UnknownError
    w.put(target, np.full(LANES, given[2].offset << 16 | given[3].offset, dtype=np.uint64))


def _pack_predicates(w: Warp, code: Instruction) -> None:
    target, _, base, mask = code.operands
    value = w.word(base) & ~w.word(mask)
    for i, held in enumerate(w.predicates["P"][:7]):
        if mask.word >> i & 1:
            if held is None:
                raise UnknownError
            value = value | held.astype(np.uint64) << np.uint64(i)
    w.put(target, value)


def _unpack_predicates(w: Warp, code: Instruction) -> None:
    _, given, mask = code.operands
    value = w.word(given)
    for i in range(7):
        if mask.word >> i & 1:
            w.put_truth(Operand("P", i), value >> np.uint64(i) & np.uint64(1) == 1)


def _division_is_fast(w: Warp, code: Instruction) -> None:
    w.put_truth(code.operands[0], np.zeros(LANES, dtype=bool))


def _exchange(w: Warp, code: Instruction) -> None:
    outs, target, given = code.parts
    for out in outs:
        w.put_truth(out, np.ones(LANES, dtype=bool))
    w.put(target, w.word(given[0]))


def _atomic(w: Warp, code: Instruction) -> None:
    _, target, _ = code.parts
    w.put(target, np.zeros(LANES, dtype=np.uint64))


_RUN: dict[str, Callable[[Warp, Instruction], None]] = {
    **dict.fromkeys(("IADD3", "IADD", "VIADD"), arithmetic.add),
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"), _real),
    **dict.fromkeys(("SEL", "FSEL"), arithmetic.select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX"), arithmetic.extreme),
    **dict.fromkeys(("LDG", "LD"), _load),
    **dict.fromkeys(("LDC", "LDCU"), _constant),
    **dict.fromkeys(("S2R", "CS2R"), _special),
    **dict.fromkeys(("HFMA2", "HADD2"), _half_constant),
    **dict.fromkeys(("I2F", "I2FP"), _from_integer),
    "IMAD": arithmetic.multiply,
    "LEA": arithmetic.lea,
    "SHF": arithmetic.shift,
    "LOP3": arithmetic.logic,
    "PLOP3": arithmetic.predicate_logic,
    "ISETP": arithmetic.compare,
    "FSETP": _compare_real,
    "MOV": arithmetic.move,
    "FMNMX": _extreme_real,
    "MUFU": _function,
    "F2I": _to_integer,
    "PRMT": arithmetic.permute,
    "LDS": _load_shared,
    "STS": _store_shared,
    "LDL": _load_local,
    "STL": _store_local,
    "R2UR": _to_uniform,
    "VOTE": _vote,
    "P2R": _pack_predicates,
    "R2P": _unpack_predicates,
    "SGXT": arithmetic.extend,
    "IABS": arithmetic.absolute,
    "FCHK": _division_is_fast,
    "SHFL": _exchange,
    "ATOMG": _atomic,
}
# The uniform datapath has the same opcodes behind a U; one of its own is spelled otherwise.
_RUN |= {f"U{name}": run for name, run in _RUN.items()} | {"S2UR": _special, "VOTEU": _vote}


def run(warp: Warp, code: Instruction) -> None:
    """Applies one instruction that is no branch, to the lanes that take part.

    Raises:
        UnknownError: what it reads, or what it does, is not known.
    """
    if code.base in _NOTHING:
        return
    found = _RUN.get(code.base)
    if found is None:
        raise UnknownError
    found(warp, code)
