"""What happened to a script's step functions: a table at its end, and the same as JSON. Needs no torch of its own."""

import json
import multiprocessing
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import loading
from .settings import rank, ranks

if TYPE_CHECKING:
    from .dispatch import Dispatch
    from .replaced import Replacements

KINDS = ("rollout", "replay")
_HEAD = ("function", "kind", "calls", "us, ours", "us, original", "host reads avoided")


def collect(replacements: "Replacements") -> dict[str, Any]:
    """All of it in plain numbers, texts, lists and dicts; waits for the device where times are still on it."""
    called = [d.dispatch for d in replacements.definitions if d.dispatch is not None]
    return {
        "settings": asdict(replacements.settings),
        "functions": [_function(dispatch) for dispatch in called],
        "not_replaced": list(replacements.refused),
        "not_called": [f"{d.where} {d.label}" for d in replacements.definitions if d.dispatch is None],
        "accelerated": list(loading.RECORDS),
        "first_update": None if replacements.audit is None else replacements.audit.result(),
        "peak_memory": peak_memory(),
    }


def _function(dispatch: "Dispatch") -> dict[str, Any]:
    meter, kinds = dispatch.meter, {}
    for kind, name in enumerate(KINDS):
        ours, theirs = (min((clock.read() for clock in c[kind]), default=None) for c in (meter.ours, meter.theirs))
        reads, own = meter.reads[kind], meter.read_by_ours[kind]
        avoided = None if reads is None or own is None else (reads - own) * meter.calls[kind]
        kinds[name] = {
            "calls": meter.calls[kind],
            "microseconds": ours,
            "microseconds_of_original": theirs,
            "host_reads_avoided": avoided,
        }
    return {
        "function": dispatch.definition.label,
        "where": dispatch.definition.where,
        "by": [known.target for known in dispatch.taken],
        "about": [known.about for known in dispatch.taken],
        **kinds,
        "calls_of_original": dict(dispatch.kept),
        "original_not_timed": meter.untimed,
    }


def peak_memory() -> dict[str, Any]:
    """Bytes at the most, and of what: the GPUs' allocations where CUDA was used, else the process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        most = max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
        return {"bytes": most, "of": "GPU memory allocated by torch"}
    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "resident memory of the process"}


def finish(replacements: "Replacements") -> None:
    """Reads what is still on a device, prints the table, and writes the file that `--report` names.

    What stands in the way is said: a script's end is its own.
    """
    called = [d for d in replacements.definitions if d.dispatch is not None]
    if not called and multiprocessing.parent_process() is not None:
        return  # a loader's worker, for one, has nothing to tell
    try:
        found = collect(replacements)
        if called or found["accelerated"]:
            replacements.say(f"\n{table(found)}")
        elif replacements.definitions:
            names = ", ".join(sorted({d.label for d in replacements.definitions}))
            replacements.say(f"none of these functions was called in this process: {names}")
        if replacements.settings.report is not None:
            _write(_own(Path(replacements.settings.report)), found)
    except Exception as error:
        replacements.say(f"the report is incomplete: {type(error).__name__}: {error}")


def table(found: dict[str, Any]) -> str:
    """What `collect` returned, to be read."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for function in found["functions"]:
        name = f"{function['where']} {function['function']}"
        for kind in KINDS:
            cells = function[kind]
            if cells["calls"]:
                times = (cells["microseconds"], cells["microseconds_of_original"])
                reads = cells["host_reads_avoided"]
                rows.append((name, kind, str(cells["calls"]), *map(_time, times), "-" if reads is None else str(reads)))
                name = ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    aligned = [
        [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
    ]
    lines = ["  ".join(row).rstrip() for row in aligned] if len(rows) > 1 else []
    for function in found["functions"]:
        for why, times in function["calls_of_original"].items():
            lines.append(f"{times} calls of the original {function['function']}: {why}")
        if function["original_not_timed"]:
            lines.append(f"the original {function['function']} was not timed: {function['original_not_timed']}")
    if found["not_called"]:
        lines.append(f"never called: {', '.join(found['not_called'])}")
    update = found["first_update"]
    if update is not None:
        lines.append(update["text"])
    models: dict[str, None] = {}
    for record in found["accelerated"]:
        how = f"block ops ({record['mode']})" if record["accepted"] else f"as it was: {record['reason']}"
        models[f"{record['class']}: {how}"] = None
    lines += models
    memory = found["peak_memory"]
    lines.append(f"peak memory: {memory['bytes'] / 2**30:.2f} GiB ({memory['of']})")
    return "\n".join(f"  {line}" for line in lines)


def _time(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:,.0f}"


def _own(path: Path) -> Path:
    """The file of this process: one of several ranks has its number in the name."""
    return path if ranks() == 1 else path.with_name(f"{path.stem}.rank{rank()}{path.suffix}")


def _write(path: Path, found: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(partial, path)
