"""GPUs, how many programs of a kernel one holds, and what its instructions and bytes take at the least.

Sizes are those of NVIDIA's data sheets and of the CUDA programming guide (compute capabilities, arithmetic throughput).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# What a large copy reaches of the memory's nominal rate; of an H200, 4.3 of 4.8 TB/s.
COPY_OF_NOMINAL = 0.9
# Instructions that a multiprocessor issues in a cycle, one for each of its parts.
ISSUED = 4
REGISTERS = 65536
# Shared memory that each program takes besides its own.
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: threads, programs, KiB of shared memory; cycles that a unit is busy with a warp."""

    threads: int
    programs: int
    shared_kib: int
    fma: int
    fp64: int
    alu: int = 2
    imad: int = 2
    xu: int = 8


LIMITS = {
    80: Limits(2048, 32, 164, fma=2, fp64=4),
    89: Limits(1536, 24, 100, fma=1, fp64=64),
    90: Limits(2048, 32, 228, fma=1, fp64=2),
    100: Limits(2048, 32, 228, fma=1, fp64=2),
    120: Limits(1536, 24, 100, fma=1, fp64=64),
}


@dataclass(frozen=True)
class Chip:
    """A GPU: its architecture, multiprocessors, clock in GHz and nominal memory rate in TB/s."""

    name: str
    architecture: int
    multiprocessors: int
    clock: float
    memory: float


CHIPS = (
    Chip("H100", 90, 132, 1.98, 3.35),
    Chip("H200", 90, 132, 1.98, 4.8),
    Chip("A100", 80, 108, 1.41, 2.04),
    Chip("RTX 4090", 89, 128, 2.52, 1.008),
)


def places(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Programs that share a multiprocessor."""
    limits = LIMITS[architecture]
    warps = threads // 32
    # Registers are given to warps in units of 256.
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = limits.shared_kib * 1024 // (shared + RESERVED_SHARED)
    return min(limits.programs, limits.threads // threads, by_registers, by_shared)


@dataclass(frozen=True)
class Prediction:
    """Microseconds of issue, of the busiest unit and of the bytes; waves of programs; the share of a copy's rate."""

    issue_us: float
    unit_us: float
    unit: str
    byte_us: float
    waves: float
    # All overlaps, or instructions and bytes as unrelated as two sides of a right angle and the last wave unfilled.
    most: float
    least: float


def predict(
    chip: Chip, programs: int, held: int, instructions: float, units: Mapping[str, float], moved: int
) -> Prediction:
    """Of one launch, of so many instructions a program (and of these so many for each unit) and bytes in all."""
    limits = LIMITS[chip.architecture]
    # The busiest multiprocessor has this many programs.
    cycles = -(-programs // chip.multiprocessors) / ISSUED / (chip.clock * 1e3)
    busy = {name: units.get(name, 0) * getattr(limits, name) for name in ("alu", "xu", "fp64", "imad")}
    busy["fma"] = units.get("fma", 0) * limits.fma + units.get("imad", 0) * (limits.fma if limits.fma == 1 else 2)
    unit = max(busy, key=lambda name: busy[name])
    issue, unit_us = instructions * cycles, busy[unit] * cycles
    byte = moved / (chip.memory * COPY_OF_NOMINAL) / 1e6
    waves = programs / (held * chip.multiprocessors)
    longest = max(issue, unit_us)
    filled = waves / math.ceil(waves)
    return Prediction(
        issue, unit_us, unit, byte, waves, byte / max(longest, byte), byte / math.hypot(longest, byte) * filled
    )
