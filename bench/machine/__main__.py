"""Counts every kernel's machine code for every architecture; rows and a page in bench/results, stamped "predicted"."""

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench.environment import environment
from bench.repository import RESULTS
from bench.rows import Row, grid, made_with, read, write

from .cases import COUNTED, EVERY_SHAPE, Case, cases
from .chips import CHIPS, LIMITS, places, predict
from .launches import Launch, count, nvcc_version

OUT = RESULTS / "machine.jsonl"
NOTES = """\
Every kernel compiled offline and its machine code followed, as `python -m bench.machine` does; no GPU was there.

- *instructions*: issued for an element (of queries and keys alike), lanes that a mask switches off included.
- *issue*: microseconds in which the busiest multiprocessor issues them, four a cycle at the boost clock.
  *unit*: in which its busiest unit runs them.
  *bytes*: of all tensors, each once, at 90 % of the memory's nominal rate, what a large copy reaches.
- *share*: of a copy of as many bytes. The upper end is what is left where all overlaps; the lower one takes issue and
  bytes as the sides of a right angle, and leaves the last wave of programs unfilled. Latency, caches and the cost of a
  launch are in neither.
- *programs*: on a multiprocessor at once, of all; *waves*: how often the GPU is filled by them.
"""


def row(case: Case, launch: Launch, number: int) -> Row:
    """One launch: what was counted, and what follows for each GPU of that architecture."""
    counted = count(launch, case.samples)
    held = places(launch.architecture, launch.threads, launch.registers, launch.shared)
    per_element = 32 * launch.programs / case.elements
    predicted = {}
    for chip in (chip for chip in CHIPS if chip.architecture == launch.architecture):
        p = predict(chip, launch.programs, held, counted.instructions, counted.units, launch.bytes)
        numbers = {"issue_us": p.issue_us, "unit_us": p.unit_us, "byte_us": p.byte_us, "waves": p.waves}
        rounded = {name: round(value, 2) for name, value in numbers.items()}
        predicted[chip.name] = {**rounded, "unit": p.unit, "share": [round(p.least, 3), round(p.most, 3)]}
    return {
        "case": case.name,
        "shape": case.shape,
        "launch": number,
        "op": launch.op,
        "kernel": launch.kernel,
        "architecture": launch.architecture,
        "stamp": "predicted",
        "registers": launch.registers,
        "spilled_bytes": launch.spilled,
        "shared_bytes": launch.shared,
        "threads": launch.threads,
        "programs": launch.programs,
        "programs_held": held,
        "code": len(launch.function.code),
        "instructions": round(counted.instructions * per_element, 3),
        "units": {name: round(n * per_element, 3) for name, n in sorted(counted.units.items()) if name},
        "asked_bytes": round(counted.asked * launch.programs / case.elements, 3),
        "bytes": launch.bytes,
        "predicted": predicted,
    }


def rows(wanted: str, architectures: list[int], cuda: bool) -> Iterator[Row]:
    """All rows whose case and shape hold `wanted`."""
    for case in cases(cuda):
        if wanted not in case.id:
            continue
        for architecture in architectures:
            if case.shape not in COUNTED and architecture != EVERY_SHAPE:
                continue
            for number, launch in enumerate(case.launches(architecture)):
                yield row(case, launch, number)


def _id(found: Row) -> str:
    return f"{found['case']}, {found['shape']}"


def _share(found: Row) -> str:
    low, high = found["share"]
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def table(found: list[Row], gpu: str) -> list[str]:
    """Lines for one GPU; what is too small to matter beside its case's first launch is left out."""
    lines = []
    for one in (r for r in found if gpu in r["predicted"]):
        p = one["predicted"][gpu]
        if one["launch"] and p["byte_us"] + p["issue_us"] < 2:
            continue
        lines.append(
            (
                f"{one['case']}, {one['shape']}" if one["launch"] == 0 else f"then {one['kernel']}",
                f"{one['instructions']:.1f}",
                one["registers"],
                one["spilled_bytes"],
                f"{one['shared_bytes'] / 1024:.1f}",
                f"{one['programs_held']} of {one['programs']:,}",
                f"{p['waves']:.2f}",
                f"{p['issue_us']:.1f}",
                f"{p['unit_us']:.1f} {p['unit']}",
                f"{p['byte_us']:.1f}",
                _share(p),
            )
        )
    head = ("call", "instructions", "registers", "spilled", "shared KiB", "programs", "waves")
    return grid((*head, "issue us", "unit us", "bytes us", "share"), lines)


def page(found: list[Row]) -> str:
    """The page of all GPUs."""
    parts = ["# Kernels by their machine code", "**Predicted, not measured.** " + made_with(found[0]), NOTES]
    for chip in CHIPS:
        if any(chip.name in r["predicted"] for r in found):
            size = (
                f"sm_{chip.architecture}, {chip.multiprocessors} multiprocessors, {chip.clock} GHz, {chip.memory} TB/s"
            )
            parts += [f"## {chip.name}", size + ".", "\n".join(table(found, chip.name))]
    others = sorted({r["architecture"] for r in found} - {chip.architecture for chip in CHIPS})
    if others:
        head = ("call", *(f"sm_{a}: instructions, registers, spilled" for a in others))
        by_key: dict[tuple[object, ...], list[str]] = {}
        for r in (r for r in found if r["architecture"] in others):
            key = (f"{r['case']}, {r['shape']}, {r['kernel']}", r["launch"])
            cell = f"{r['instructions']:.1f}, {r['registers']}, {r['spilled_bytes']}"
            by_key.setdefault(key, []).append(cell)
        lines = [(key[0], *cells) for key, cells in by_key.items()]
        parts += ["## Other architectures", "Counts alone.", "\n".join(grid(head, lines))]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine", description=__doc__)
    parser.add_argument("--only", default="", help="calls whose name and shape contain this; prints their table alone")
    parser.add_argument("--replace", action="store_true", help="of the results, those that --only is about")
    parser.add_argument("--gpu", default="H200", help="whose table is printed")
    parser.add_argument("--architectures", type=int, nargs="+", default=sorted(LIMITS), choices=sorted(LIMITS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    cuda = find_spec("dancegrpo_fast._cuda") is not None
    where = environment() | {"nvcc": nvcc_version() if cuda else ""}
    found: list[Row] = []
    for one in rows(options.only, options.architectures, cuda):
        found.append({**one, "environment": where})
        print(
            f"sm_{one['architecture']} {one['case']}, {one['shape']}, {one['kernel']}: {one['instructions']:.2f}",
            flush=True,
        )
    print("predicted, not measured", *table(found, options.gpu), sep="\n")
    if options.replace or not options.only:
        order = [case.id for case in cases(cuda)]
        kept = [r for r in read(options.out) if options.only not in _id(r) and _id(r) in order]
        found = sorted(kept + found, key=lambda r: order.index(_id(r)))
        write(options.out, found)
        options.out.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
