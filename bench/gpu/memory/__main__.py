"""Predicts and measures, writes one JSON line a row and prints a table."""

import argparse
import gc
import importlib.metadata
import re
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from ...harness import environment
from ...rows import Row, Rows
from . import kernels, models, vaes

OPS = ("memory", "attention memory", "decode memory")
ATTENTION_SECONDS = 3.0
Planned = tuple[str, float, Callable[[torch.device, Row], Row]]


def _mib(row: Row, key: str) -> str:
    return f"{row[key] / 2**20:12.2f}" if row.get(key) is not None else " " * 12


def table(rows: list[Row]) -> str:
    """Predicted and measured MiB; what does not run, with its reason."""
    head = f"{'op':17}{'what':100}{'peak: fake':>12}{'measured':>12}{'off':>8}{'saved: fake':>12}{'measured':>12}"
    lines = [head + f"{'allocated':>12}{'reserved':>12}"]
    for row in rows:
        if row["op"] == "memory":
            what = f"{row['model']}; {row['attention']}; {row['policy']}; block ops {row['patch']}"
        elif row["op"] == "decode memory":
            what = f"{row['model']}, {row['sample']}, untiled"
        else:
            what = f"{row['attention']}, {'mask' if row['masked'] else 'no mask'}; "
            what += ", ".join(row["kernels"]) if row["runs"] else row["error"]
        off = f"{row['peak_off']:8.1%}" if row.get("peak_off") is not None else " " * 8
        lines.append(
            f"{row['op']:17}{what[:98]:100}{_mib(row, 'predicted_peak_bytes')}{_mib(row, 'measured_peak_bytes')}{off}"
            f"{_mib(row, 'predicted_saved_bytes')}{_mib(row, 'measured_saved_bytes')}"
            f"{_mib(row, 'allocated_bytes')}{_mib(row, 'reserved_bytes')}"
        )
    return "\n".join(lines)


def planned(dry: bool) -> list[Planned]:
    """In the order of their worth: time may run out."""

    def attention(backend: str, masked: bool) -> Planned:
        label = f"attention memory, {backend}, {'mask' if masked else 'no mask'}"
        return label, ATTENTION_SECONDS, partial(kernels.row, backend, masked)

    def training(cases: Iterable[models.Case]) -> list[Planned]:
        return [(case.label, case.seconds, partial(models.row, case)) for case in cases]

    found: list[Planned] = [
        *(attention(backend, True) for backend in kernels.MASKED),
        *training(models.FIRST),
        *((case.label, case.seconds, partial(vaes.row, case)) for case in vaes.CASES),
        *training(models.LATER),
        *(attention(backend, masked) for backend in kernels.BACKENDS for masked in (False, True)),
    ]
    once = {label: (label, 0.0 if dry else seconds, run) for label, seconds, run in found}
    return list(once.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.memory", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "dry"), default="cuda", help="dry: small models on the CPU")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case that would not end within them")
    parser.add_argument("--out", type=Path, help="results file; rows of others in it are kept")
    parser.add_argument("--only", default="", help="only cases whose name this regular expression finds")
    parser.add_argument("--resume", action="store_true", help="keep what --out has already")
    options = parser.parse_args()
    begin = time.monotonic()
    dry = options.device == "dry"
    if dry:
        torch.set_num_threads(1)
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    where = (
        environment(device) | {"diffusers": importlib.metadata.version("diffusers")} | ({"dry": True} if dry else {})
    )
    print("  ".join(f"{k} {v}" for k, v in where.items()), flush=True)
    rows = Rows(options.out, lambda row: row["op"] in OPS, options.resume)
    failed: list[str] = []
    not_reached: list[str] = []
    for label, seconds, run in planned(dry):
        if label in rows.done or not re.search(options.only, label):
            continue
        if time.monotonic() - begin + seconds > options.seconds:
            not_reached.append(label)
            continue
        started = time.monotonic()
        try:
            rows.add(label, [run(device, where)])
        except Exception as error:
            # What the other cases show is worth having.
            print(f"{label}: not measured: {type(error).__name__}: {error}", flush=True)
            failed.append(label)
        print(f"{label}: {time.monotonic() - started:.0f} s", flush=True)
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()
    print(table(rows.written))
    print(f"\n{len(rows.written)} rows" + (f" in {options.out}" if options.out is not None else ""))
    if not_reached:
        print(f"out of time for: {', '.join(not_reached)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
