"""Runs the benchmarks: verifies, measures, writes one JSON line per row and prints a table."""

import argparse
import json
from pathlib import Path

import torch

from . import host, report
from .cases import OPS, Inputs, cases, contenders
from .harness import copy_contender, environment, interleave
from .verify import failures

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the largest and smallest shape in float32, fewer rounds")
    parser.add_argument("--op", choices=OPS, action="append", help="only these ops; repeat for several")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 11, or 5 with --quick)")
    parser.add_argument("--threads", type=int, help="torch threads (default torch's own)")
    parser.add_argument(
        "--out",
        type=Path,
        help="results file (default results/cpu-<date>.jsonl, with the threads in its name where they are given)",
    )
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rounds = options.rounds or (5 if options.quick else 11)
    where = environment()
    named = f"cpu-{where['date'][:10]}" + (f"-threads{options.threads}" if options.threads else "")
    out = options.out or RESULTS / f"{named}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    print("  ".join(f"{k} {v}" for k, v in where.items()), flush=True)

    rows: list[report.Row] = []

    def keep(new: list[report.Row]) -> None:
        rows.extend(new)
        with out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)

    out.unlink(missing_ok=True)
    copy, copy_bytes = copy_contender()
    for case in cases(options.quick):
        if options.op and case.op not in options.op:
            continue
        torch._dynamo.reset()
        inputs = Inputs(case)
        calls = contenders(case, inputs)
        wrong = failures(case, inputs, calls)
        for name, reason in wrong.items():
            print(f"{case.op} {case.label}: {name} is wrong: {reason}", flush=True)
        if any(name.startswith("ours") for name in wrong):
            continue
        moved = report.eager_bytes(calls["eager"])
        timings = interleave({**calls, "copy": copy}, rounds)
        keep(report.case_rows(case, inputs, timings, moved, copy_bytes, set(wrong), where))
        print(f"{case.op} {case.label}: done", flush=True)
    keep(report.host_rows(host.measure(rounds), where))
    print(report.table(rows))
    print(f"\n{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
