"""Machine code as cuobjdump prints it: instructions, their operands, and which unit of a multiprocessor runs each."""

import re
import struct
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+\{?\s*(.*?)\s*;")
_FUNCTION = re.compile(r"^\s+Function : (\S+)")
_GUARD = re.compile(r"^@(!?)(U?P(?:\d|T))\s+")
_REGISTER = re.compile(r"^(U?R)(\d+|Z)$")
_PREDICATE = re.compile(r"^(!?)(U?P)(\d|T)$")
_CONSTANT = re.compile(r"^c\[0x([0-9a-f]+)\]\[(U?R\d+)?\+?(-?0x[0-9a-f]+)?\]$")

# Where an opcode runs; what is not named takes an issue slot alone.
_UNITS = {
    "FADD FMUL FFMA HADD2 HFMA2 HMUL2 FADD2 FMUL2 FFMA2 FHADD": "fma",
    "IMAD": "imad",
    "IADD3 IADD VIADD LOP3 SHF LEA ISETP FSETP SEL FSEL PRMT FMNMX IMNMX VIMNMX VIMNMX3 VIADDMNMX IABS I2FP F2FP PLOP3 "
    "P2R R2P SGXT FSET VOTE": "alu",
    "MUFU I2F F2I F2F POPC FLO BREV": "xu",
    "DADD DMUL DFMA DSETP": "fp64",
}
_UNIT_OF = {name: unit for names, unit in _UNITS.items() for name in names.split()}


@dataclass(frozen=True)
class Operand:
    """`kind` is R, UR, P, UP, constant, memory, number, float or other; `index` -1 is the zero or true of its kind."""

    kind: str
    index: int = -1
    negative: bool = False
    inverted: bool = False
    absolute: bool = False
    wide: bool = False
    # The word of a number, the bank of a constant.
    word: int = 0
    offset: int = 0
    # Registers that make up an address.
    parts: "tuple[Operand, ...]" = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    `guard` is the predicate without which it does nothing, `target` where a branch goes, `special` what S2R reads.
    """

    address: int
    name: str
    operands: tuple[Operand, ...]
    guard: Operand | None
    target: int
    special: str = ""

    @cached_property
    def base(self) -> str:
        """The opcode without its suffixes."""
        return self.name.partition(".")[0]

    @cached_property
    def suffixes(self) -> frozenset[str]:
        """What follows the opcode."""
        return frozenset(self.name.split(".")[1:])

    @cached_property
    def parts(self) -> tuple[list[Operand], Operand, list[Operand]]:
        """Predicates that are written, before or behind the register that is, and what is read."""
        first = next(i for i, o in enumerate(self.operands) if o.kind in ("R", "UR"))
        rest = list(self.operands[first + 1 :])
        behind = next((i for i, o in enumerate(rest) if o.kind not in ("P", "UP")), len(rest))
        return [*self.operands[:first], *rest[:behind]], self.operands[first], rest[behind:]

    @cached_property
    def unit(self) -> str:
        """Where it runs: "fma", "imad", "alu", "xu", "fp64", or "" for what no unit here is short of."""
        return _UNIT_OF.get(self.base, "")


def float_word(value: float) -> int:
    """float32 as it is stored."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _memory(text: str) -> Operand:
    inside = text[text.rindex("[") + 1 : -1]
    parts, offset = [], 0
    for term in re.findall(r"[+-]?[^+-]+", inside):
        clean = term.lstrip("+")
        if re.fullmatch(r"-?0x[0-9a-f]+", clean):
            offset += int(clean, 16)
        else:
            parts.append(operand(clean))
    return Operand("memory", offset=offset, parts=tuple(parts))


def operand(text: str) -> Operand:
    """One operand."""
    text = text.strip()
    if found := _PREDICATE.match(text):
        index = -1 if found[3] == "T" else int(found[3])
        return Operand(found[2], index, inverted=found[1] == "!")
    if text.startswith(("desc[", "[")):
        return _memory(text)
    bare = text
    negative, inverted = bare.startswith("-"), bare.startswith("~")
    bare = bare.lstrip("-~")
    absolute = bare.startswith("|")
    bare = bare.strip("|")
    if found := _CONSTANT.match(bare):
        parts = (operand(found[2]),) if found[2] else ()
        bank, offset = int(found[1], 16), int(found[3] or "0", 16)
        return Operand("constant", -1, negative, inverted, absolute, word=bank, offset=offset, parts=parts)
    name, _, modifiers = bare.partition(".")
    if found := _REGISTER.match(name):
        index = -1 if found[2] == "Z" else int(found[2])
        return Operand(found[1], index, negative, inverted, absolute, "64" in modifiers.split("."))
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return Operand("number", word=int(text, 16))
    try:
        return Operand("float", word=float_word(float(text.strip())), offset=int(_half_word(float(text))))
    except (ValueError, OverflowError):
        return Operand("other")


def _half_word(value: float) -> int:
    return int(struct.unpack("<H", struct.pack("<e", value))[0]) if abs(value) < 65504 else 0


def instruction(address: int, text: str) -> Instruction:
    """One line without its address and semicolon."""
    guard = None
    if found := _GUARD.match(text):
        guard = operand(found[1] + found[2])
        text = text[found.end() :]
    name, _, rest = text.partition(" ")
    target = -1
    if name.split(".")[0] in ("BRA", "CALL", "BRX", "BRXU", "RET", "BSSY"):
        numbers = re.findall(r"-?0x[0-9a-f]+", rest)
        target = int(numbers[-1], 16) if numbers else 0
    texts = [t for t in rest.split(", ") if t.strip()]
    if name.split(".")[0] in ("RET", "BRX", "BRXU"):
        texts = [rest.split()[0]]
    special = rest.rpartition(", ")[2].strip() if "S2" in name else ""
    return Instruction(address, name, tuple(operand(t) for t in texts), guard, target, special)


@dataclass
class Function:
    """A kernel's instructions, and its constants by bank: tables of where a jump goes."""

    code: list[Instruction]
    banks: dict[int, bytes]


def dump(file: Path, architecture: int | None, what: str) -> str:
    """What cuobjdump prints."""
    chosen = [] if architecture is None else ["-arch", f"sm_{architecture}"]
    command = [str(_TOOLS / "cuobjdump"), what, *chosen, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": str(_TOOLS)}).stdout


def functions(file: Path, architecture: int | None = None) -> dict[str, Function]:
    """Every function of a file of machine code, for one architecture where it has several."""
    found: dict[str, Function] = {}
    current: list[Instruction] = []
    for line in dump(file, architecture, "-sass").splitlines():
        if name := _FUNCTION.match(line):
            current = found.setdefault(name[1], Function([], {})).code
        elif code := _LINE.match(line):
            current.append(instruction(int(code[1], 16), code[2]))
    if any(one.base in ("BRX", "BRXU") for function in found.values() for one in function.code):
        text = dump(file, architecture, "-elf")
        for bank, name, words in re.findall(r"^\.nv\.constant([1-9])\.(\w+)\n((?:0x.*\n)+)", text, re.MULTILINE):
            if name in found:
                numbers = [int(word, 16) for word in words.split()]
                found[name].banks[int(bank)] = struct.pack(f"<{len(numbers)}I", *numbers)
    return found
