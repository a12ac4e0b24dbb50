"""Runs the benchmarks: verifies, measures, writes one JSON line per row and prints a table."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import host, launches, report, slug
from .cases import Case, Inputs, cases, contenders
from .clocks import Run
from .harness import copy_contender, environment, interleave
from .plan import GPU_OPS, PLANS, Plan
from .rows import Row, Rows
from .verify import failures

RESULTS = Path(__file__).parent / "results"
# A part of a run: the ops of its rows. A profiler slows the calls after it, so launches are counted last or alone.
PARTS = {"host": ("host", "launches"), "cases": GPU_OPS}


def measure(case: Case, plan: Plan, copy: tuple[Run, int], rounds: int, where: Row) -> tuple[list[Row], list[str]]:
    """Rows of one case, and the implementations that are wrong: they are not measured, and it is printed how."""
    torch._dynamo.reset()
    inputs = Inputs(case, plan)
    calls = contenders(case, inputs, plan)
    wrong = failures(case, inputs, calls, plan)
    for name, reason in wrong.items():
        print(f"{case.op} {case.label}: {name} is wrong: {reason}", flush=True)
    refused = [ours for ours in plan.implementations if any(name.startswith(ours) for name in wrong)]
    calls = {name: call for name, call in calls.items() if not name.startswith(tuple(refused))}
    if not any(name.startswith("ours") for name in calls):
        return [], refused
    moved = report.eager_bytes(calls["eager"])
    timings = interleave({**calls, "copy": copy[0]}, rounds, clock=plan.clock(inputs.sets))
    rows = report.case_rows(case, inputs, timings, moved, copy[1], set(wrong), where)
    print(f"{case.op} {case.label}: done", flush=True)
    return rows, refused


def without_broken(plan: Plan) -> Plan:
    """The plan without implementations that cannot run a call: they must not cost the others their rows."""
    working, missing = {}, dict(plan.missing)
    for name, backend in plan.implementations.items():
        try:
            for run in host.calls(backend, plan.device).values():
                run(0)
            working[name] = backend
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return replace(plan, implementations=working, missing=missing)


def extremes_first(planned: list[Case]) -> list[Case]:
    """The largest and the smallest shape, then the others from the largest on."""
    sizes = [case.batch * case.elements for case in planned]
    ends = (max(sizes, default=0), min(sizes, default=0))
    return sorted(planned, key=lambda case: (case.batch * case.elements not in ends, -case.batch * case.elements))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the largest and smallest shape in float32, fewer rounds")
    parser.add_argument("--device", choices=PLANS, default="cpu", help="dry: the GPU's run on a few CPU elements")
    parser.add_argument("--op", choices=GPU_OPS, action="append", help="only these ops; repeat for several")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 11, or 5 with --quick)")
    parser.add_argument("--seconds", type=float, help="start no case after so many seconds; the extremes come first")
    parser.add_argument("--only", choices=PARTS, help="what calls cost the host and launch, or the cases alone")
    parser.add_argument("--resume", action="store_true", help="keep what --out has already")
    parser.add_argument("--threads", type=int, help="torch threads (default torch's own)")
    parser.add_argument(
        "--out",
        type=Path,
        help="results file (default results/<cpu or gpu-name>-<date>.jsonl, with the threads in it where given)",
    )
    options = parser.parse_args()
    begin = time.monotonic()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    plan = without_broken(PLANS[options.device]())
    rounds = options.rounds or (5 if options.quick else 11)
    where = environment(plan.device) | ({"dry": True} if options.device == "dry" else {})
    named = f"gpu-{slug(where['gpu'])}" if "gpu" in where else options.device
    named += f"-{where['date'][:10]}" + (f"-threads{options.threads}" if options.threads else "")
    out = options.out or RESULTS / f"{named}.jsonl"
    print("  ".join(f"{k} {v}" for k, v in where.items()), flush=True)
    for name, reason in plan.missing.items():
        print(f"{name} is not measured: {reason}", flush=True)

    failed: list[str] = list(plan.missing)
    not_reached: list[str] = []
    ops = PARTS[options.only] if options.only else (*PARTS["host"], *PARTS["cases"])
    rows = Rows(out, lambda row: row["op"] in ops, options.resume)
    if "host" in ops and "host" not in rows.done:
        rows.add("host", report.host_rows(host.measure(rounds, plan), where))
    copy = copy_contender(plan.device, plan.copy_bytes)
    planned = [case for case in cases(options.quick, plan) if not options.op or case.op in options.op]
    for case in extremes_first(planned) if "step" in ops else []:
        label = f"{case.op} {case.label}"
        if label in rows.done:
            continue
        if options.seconds is not None and time.monotonic() - begin > options.seconds:
            not_reached.append(label)
            continue
        try:
            new, refused = measure(case, plan, copy, rounds, where)
        except Exception as error:
            # What the other cases show is worth having.
            print(f"{label}: not measured: {type(error).__name__}: {error}", flush=True)
            new, refused = [], ["an error"]
        rows.add(label, new)
        failed += [f"{label} ({reason})" for reason in refused]
    if "launches" in ops and options.device != "cpu" and "launches" not in rows.done:
        rows.add("launches", launches.rows(plan, where))
    print(report.table(rows.written))
    print(f"\n{len(rows.written)} rows in {out}")
    if not_reached:
        print(f"out of time for: {', '.join(not_reached)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
