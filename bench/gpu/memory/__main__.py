"""Predicts and measures, writes one JSON line a row and prints a table."""

import argparse
import gc
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...harness import environment
from . import kernels, models

Row = dict[str, Any]
OPS = ("memory", "attention memory")
ATTENTION_SECONDS = 3.0


def _mib(row: Row, key: str) -> str:
    return f"{row[key] / 2**20:12.2f}" if row.get(key) is not None else " " * 12


def table(rows: list[Row]) -> str:
    """Predicted and measured MiB; what does not run, with its reason."""
    head = f"{'op':17}{'what':100}{'peak: fake':>12}{'measured':>12}{'off':>8}{'saved: fake':>12}{'measured':>12}"
    lines = [head]
    for row in rows:
        if row["op"] == "memory":
            what = f"{row['model']}; {row['attention']}; {row['policy']}; block ops {row['patch']}"
        else:
            what = f"{row['attention']}, {'mask' if row['masked'] else 'no mask'}; "
            what += ", ".join(row["kernels"]) if row["runs"] else row["error"]
        off = f"{row['peak_off']:8.1%}" if row.get("peak_off") is not None else " " * 8
        lines.append(
            f"{row['op']:17}{what[:98]:100}{_mib(row, 'predicted_peak_bytes')}{_mib(row, 'measured_peak_bytes')}{off}"
            f"{_mib(row, 'predicted_saved_bytes')}{_mib(row, 'measured_saved_bytes')}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.memory", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "dry"), default="cuda", help="dry: small models on the CPU")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case that would not end within them")
    parser.add_argument("--out", type=Path, help="results file; rows of others in it are kept")
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
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        before = options.out.read_text().splitlines(keepends=True) if options.out.exists() else []
        options.out.write_text("".join(line for line in before if json.loads(line)["op"] not in OPS))

    planned: list[tuple[str, float, Any]] = [
        (case.label, 0.0 if dry else case.seconds, lambda case=case: models.row(case, device, where))
        # The last ones are of every model; which kernel of a GPU attends makes no difference to a CPU.
        for case in (models.CASES[-4:] if dry else models.CASES)
    ]
    planned += [
        (
            f"attention memory, {backend}, {'mask' if masked else 'no mask'}",
            0.0 if dry else ATTENTION_SECONDS,
            lambda backend=backend, masked=masked: kernels.row(backend, masked, device, where),
        )
        for backend in kernels.BACKENDS
        for masked in (False, True)
    ]
    rows: list[Row] = []
    failed: list[str] = []
    not_reached: list[str] = []
    for label, seconds, run in planned:
        if time.monotonic() - begin + seconds > options.seconds:
            not_reached.append(label)
            continue
        started = time.monotonic()
        try:
            row = run()
        except Exception as error:
            # What the other cases show is worth having.
            print(f"{label}: not measured: {type(error).__name__}: {error}", flush=True)
            failed.append(label)
        else:
            rows.append(row)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        print(f"{label}: {time.monotonic() - started:.0f} s", flush=True)
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()
    print(table(rows))
    print(f"\n{len(rows)} rows" + (f" in {options.out}" if options.out is not None else ""))
    if not_reached:
        print(f"out of time for: {', '.join(not_reached)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
