"""What others saw allocators and processes hold beside tensors, and what the planner takes for it."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from bench.rows import Row, grid
from dancegrpo_fast.memory.planning.cards import CARDS
from dancegrpo_fast.memory.planning.margins import CONTEXT, FRAGMENTATION, FRAGMENTATION_SHARDED, NCCL

TAKEN = (FRAGMENTATION, FRAGMENTATION_SHARDED)
FOLDER = Path(__file__).parent / "evidence"


def read(name: str) -> list[Row]:
    """A file of `evidence/`."""
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _line(name: str, values: Iterable[float], unit: str, taken: str) -> list[str]:
    found = sorted(values)
    return [name, str(len(found)), *(f"{v:.2f} {unit}" for v in (found[0], median(found), found[-1])), taken]


def _reserved(rows: Iterable[Row]) -> list[float]:
    return [100 * (row["reserved_gib"] / row["allocated_gib"] - 1) for row in rows]


def table(rows: list[Row]) -> list[str]:
    """Each kind of margin: how many were found, the least, the median, the most, and what the planner takes."""
    runs = [row for row in rows if row["kind"] in ("training", "FSDP") and not row["out_of_memory"]]
    stopped = [row for row in rows if row["kind"] in ("training", "FSDP") and row["out_of_memory"]]
    alone, shared = ([row for row in runs if row["kind"] == kind] for kind in ("training", "FSDP"))
    pairs = [row for row in rows if row["kind"] == "pair"]
    contexts = [row for row in rows if row["kind"] == "context"]
    one, all_ = ({grows: f"{100 * share:.0f} %" for grows, share in shares.items()} for shares in TAKEN)
    kept = (100 * row["reserved_on_gib"] / row["reserved_off_gib"] for row in pairs)
    single, many = ([row["mib"] / 1024 for row in contexts if row["nccl"] is nccl] for nccl in (False, True))
    lines = [
        _line("reserved above allocated, one process, segments as they are", _reserved(alone), "%", one[False]),
        _line("the same under FSDP", _reserved(shared), "%", all_[False]),
        _line(
            "at an out-of-memory error, when what was idle was given back",
            _reserved(stopped),
            "%",
            f"{one[True]}, under FSDP {all_[True]}, with expandable segments",
        ),
        _line("reserved with expandable segments, of that without", kept, "%", ""),
        _line("a process beside torch, one GPU", single, "GiB", f"{CONTEXT} GiB"),
        _line("a process beside torch, with NCCL", many, "GiB", f"{CONTEXT + NCCL} GiB"),
    ]
    return grid(["", "found", "least", "median", "most", "the planner takes"], lines)


def markdown(rows: list[Row]) -> str:
    """Margins and cards, with every source."""
    lines = [
        "# What is held beside tensors, as other people saw it",
        "",
        "Made by `python -m bench.memory --only margins` from `bench/memory/evidence/`. Measured by others, on GPUs.",
        "With expandable segments no training log with both peaks was found: the planner takes what an out-of-memory",
        "error shows, when the allocator has given back all that is idle.",
        "",
        *table(rows),
        "",
        *grid(["", "", "reserved / allocated, GiB", "source"], [_row(row) for row in rows]),
        "",
        "## Cards",
        "",
        "What torch has of a card's memory: the least that was seen. Rates are those of single operators, before the",
        "share that eager models reach.",
        "",
        *grid(["card", "GiB", "others saw", "sources"], [_card(row) for row in read("cards")]),
    ]
    return "\n".join(lines) + "\n"


def _row(row: Row) -> list[str]:
    if row["kind"] == "context":
        return ["context" + (", NCCL" if row["nccl"] else ""), row["card"], f"{row['mib'] / 1024:.2f}", row["source"]]
    if row["kind"] == "pair":
        sizes = f"{row['reserved_on_gib']} on, {row['reserved_off_gib']} off"
        return ["expandable segments", row["run"], sizes, row["source"]]
    kind = row["kind"] + (", out of memory" if row["out_of_memory"] else "")
    return [kind, row["run"], f"{row['reserved_gib']} / {row['allocated_gib']}", row["source"]]


def _card(row: Row) -> list[str]:
    taken = CARDS.get(row["card"])
    seen = ", ".join(map(str, row.get("torch_gib_seen") or [row["torch_gib"]]))
    return [row["label"], "not planned for" if taken is None else f"{taken.gib}", seen, " ".join(row["sources"])]
