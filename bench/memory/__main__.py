"""Predicts, measures and plans; writes JSON lines and readable tables into `results/`."""

import argparse
import sys
from pathlib import Path

import torch

from bench.environment import environment
from bench.repository import RESULTS
from bench.rows import Row, write

from . import atlas, choices, earlier, fsdp, margins, public, report, swaps, table
from .families import FAMILIES

PARTS = ("table", "rows", "public", "fsdp", "scenarios", "margins", "swaps")
# Takes long, and is asked for by name.
ATLAS = "atlas"


def _write(folder: Path, name: str, rows: list[Row], text: str) -> None:
    write(folder / f"{name}.jsonl", rows)
    (folder / f"{name}.md").write_text(text)
    print(f"{len(rows)} rows in {folder / name}.jsonl, and {name}.md")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated: " + ", ".join((*PARTS, ATLAS)))
    parser.add_argument(
        "--name",
        default="",
        help="only families, models or scenarios whose name contains this; of the atlas sizes: flux-dev 1 x 512 x 512",
    )
    parser.add_argument("--jobs", type=int, default=2, help="families or sizes at once, each in one thread")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in (*PARTS, ATLAS)]:
        parser.error(f"--only: got {', '.join(unknown)}, want some of {', '.join((*PARTS, ATLAS))}")
    # The atlas keeps what is there of others.
    if options.name and options.output == RESULTS and parts != [ATLAS]:
        parser.error("--name: got one with the default --output, want another folder for part of the results")
    torch.set_num_threads(1)
    where = environment()
    if "table" in parts:
        names = [family.name for family in FAMILIES if options.name in family.name]
        found: list[Row] = []
        for rows in table.rows(names, where, options.jobs) if names else ():
            found += rows
            print(f"{rows[0]['family']}: {report.worst_line(rows)}", flush=True)
            _write(options.output, "memory-measured", found, report.markdown(found))
    if "rows" in parts:
        answers = earlier.rows(where, options.name)
        if answers:
            _write(options.output, "memory-rows", answers, earlier.markdown(answers))
    if "public" in parts:
        measured = public.results(where, options.name)
        if measured:
            _write(options.output, "memory-public", measured, public.markdown(measured))
            print("\n".join(public.summary(measured)))
    if "fsdp" in parts:
        shards = [row for name in fsdp.MODELS if options.name in name for row in fsdp.rows(name, where)]
        if shards:
            _write(options.output, "memory-fsdp", shards, fsdp.markdown(shards))
    if "margins" in parts:
        (options.output / "memory-margins.md").write_text(margins.markdown(margins.read("allocators")))
    if "swaps" in parts:
        small = list(swaps.rows(where, options.name))
        if small:
            _write(options.output, "memory-swaps", small, swaps.markdown(small))
    if "scenarios" in parts:
        plans = choices.rows(where, options.name)
        if plans:
            _write(options.output, "memory-scenarios", plans, choices.markdown(plans))
            # An exit status of 1 is an answer; 2 is no plan.
            if any(row["exit_status"] not in (0, 1) for row in plans):
                sys.exit("some scenarios have no plan")
    if ATLAS in parts:
        atlas.make(options.output / atlas.FILE.name, options.name, options.jobs, where)


if __name__ == "__main__":
    main()
