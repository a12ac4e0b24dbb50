"""One launch: its machine code followed for the arguments it gets, and what it moves."""

import re
import shutil
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.triton.offline import Compiled

from .code import Function, dump, functions
from .path import follow
from .warp import UnknownError, Warp

# Made-up addresses lie this far apart: no two tensors overlap, and each begins on 16 bytes.
APART = 1 << 40
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}


@dataclass(frozen=True)
class Launch:
    """What one launch runs, compiled for `architecture`; `arguments` as they lie in its constants."""

    op: str
    kernel: str
    architecture: int
    registers: int
    spilled: int
    shared: int
    threads: int
    programs: int
    function: Function
    arguments: bytes
    # Bytes of all tensors, each once.
    bytes: int


@dataclass(frozen=True)
class Count:
    """Of one program on average: instructions of all its warps, those of each unit, bytes asked of global memory."""

    instructions: float
    units: dict[str, float]
    asked: float


def aligned(parts: Iterable[bytes]) -> bytes:
    """Arguments one after another, each on a multiple of its size."""
    out = bytearray()
    for part in parts:
        out += bytes(-len(out) % min(len(part), 8)) + part
    # What Triton appends: two addresses of scratch memory.
    return bytes(out) + bytes(-len(out) % 8 + 16)


def _packed(arguments: Sequence[tuple[str, Any]]) -> Iterable[bytes]:
    for number, (kind, value) in enumerate(arguments, 1):
        if kind.startswith("*"):
            yield struct.pack("<Q", number * APART)
        elif kind == "fp32":
            yield struct.pack("<f", value)
        else:
            yield int(value).to_bytes(_SIZES[kind], "little", signed=True)


def _moved(arguments: Sequence[tuple[str, Any]]) -> int:
    tensors = {id(value): value for _, value in arguments if isinstance(value, torch.Tensor)}
    total = 0
    for tensor in tensors.values():
        # What one row repeats is one row.
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
        total += torch.Size(sizes).numel() * tensor.element_size()
    return total


@cache
def _functions(file: Path, architecture: int | None = None) -> dict[str, Function]:
    return functions(file, architecture)


def of_triton(found: Compiled, architecture: int) -> Launch:
    """A launch that Triton compiled."""
    (function,) = _functions(found.cubin).values()
    settings = (found.op, found.kernel, architecture, found.registers, found.spilled, found.shared, found.threads)
    arguments = aligned(_packed(found.arguments))
    return Launch(*settings, found.programs, function, arguments, _moved(found.arguments))


@cache
def _cuda_resources(module: Path, architecture: int) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of local and of shared memory of each kernel."""
    text = dump(module, architecture, "-res-usage")
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {f[0]: (int(f[1]), int(f[2]) + int(f[4]), int(f[3])) for f in re.findall(pattern, text)}


def of_cuda(
    module: Path, op: str, kernel: str, architecture: int, programs: int, parts: Iterable[bytes], moved: int
) -> Launch:
    """A launch of the CUDA module's; `kernel` is a pattern of the function's mangled name, template included."""
    # An RTX 4090 runs what was compiled for an A100.
    built = 80 if architecture == 89 else architecture
    names = [name for name in _functions(module, built) if re.search(rf"\d{kernel}", name)]
    if len(names) != 1:
        raise ValueError(f"kernel: got {kernel}, which {len(names)} functions are called, want one")
    registers, local, shared = _cuda_resources(module, built)[names[0]]
    settings = (op, kernel.partition("_kernelI")[0] + "_kernel", architecture, registers, local, shared, 256)
    return Launch(*settings, programs, _functions(module, built)[names[0]], aligned(parts), moved)


@cache
def nvcc_version() -> str:
    """Of the CUDA compiler here, empty where there is none."""
    if shutil.which("nvcc") is None:
        return ""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else ""


def count(launch: Launch, samples: int = 1) -> Count:
    """Follows the first and the last warp of `samples` programs spread over the grid; those between are like the last.

    Raises:
        ValueError: the way through the code depends on what is not computed here.
    """
    last = launch.threads // 32 - 1
    instructions, asked = 0.0, 0.0
    units: defaultdict[str, float] = defaultdict(float)
    samples = min(samples, launch.programs)
    for number in range(samples):
        # One of each residue, so that parts of a row come in their proportion.
        program = launch.programs * (2 * number + 1) // (2 * samples) // samples * samples + number
        program = min(program, launch.programs - 1)
        for warp, weight in ((0, 1), (last, last)) if last else ((0, 1),):
            state = Warp(launch.architecture, launch.arguments, program, warp, launch.threads, launch.function.banks)
            try:
                issued = follow(launch.function.code, state)
            except UnknownError as problem:
                raise ValueError(f"{launch.op}.{launch.kernel}: got a branch at {problem}, want it known") from None
            instructions += weight * issued.instructions / samples
            asked += weight * issued.bytes / samples
            for unit, times in issued.units.items():
                units[unit] += weight * times / samples
    return Count(instructions, dict(units), asked)
