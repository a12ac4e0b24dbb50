"""Verifies, measures, writes one JSON line a row and prints a table."""

import argparse
import gc
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...clocks import Clock, DeviceClock, Run
from ...harness import Timing, copy_contender, environment, interleave
from ...plan import PLANS, Plan
from ...report import eager_bytes
from . import ops, pairs

Row = dict[str, Any]
ROUNDS = 7
# Of a contender in a round.
BUDGET_S = 0.02


class PatientClock(DeviceClock):
    """A block with its backward takes the host tens of milliseconds to queue."""

    TRIES = 10


def _shared(case: Any, name: str, what: str, timing: Timing, timings: dict[str, Timing], wrong: set[str]) -> Row:
    eager, compiled = (timings[peer].median if peer in timings else None for peer in ("eager", "compile"))
    return {
        "op": case.op,
        "form": case.form,
        "model": case.model,
        "pass": what,
        "backend": name,
        "batch": 1,
        "tokens": case.tokens,
        "channels": case.sizes.channels,
        "output_dtype": "bfloat16",
        "source": "measured",
        "within_budget": name not in wrong,
        "ms_median": timing.median,
        "ms_min": timing.low,
        "ms_max": timing.high,
        **({} if timing.host is None else {"host_us_median": 1e3 * timing.host}),
        "rounds": timing.rounds,
        "calls_per_round": timing.calls,
        "times_eager": None if eager is None else eager / timing.median,
        "times_compile": None if compiled is None else compiled / timing.median,
    }


class Measurement:
    """What all cases share."""

    def __init__(self, device: str, rounds: int, backend: str, plan: Plan) -> None:
        self.plan, self.rounds, self.backend = plan, rounds, backend
        # Inductor's C++ takes a minute a block, and shows nothing that matters on a GPU.
        self.compiler = "aot_eager" if device == "dry" else "inductor"
        self.where = environment(plan.device) | {"diffusers": importlib.metadata.version("diffusers")}
        if device == "dry":
            self.where["dry"] = True
        self.copy: tuple[Run, int] = copy_contender(plan.device, plan.copy_bytes)

    def _ours(self, names: set[str], prefix: str, label: str) -> list[str]:
        return [f"{label} ({name})" for name in sorted(names) if name.startswith(prefix)]

    def op(self, case: ops.Case) -> tuple[list[Row], list[str]]:
        """Rows of both passes, and ours that are wrong: they are not measured."""
        parts = case.build(self.plan.device, case.sizes)
        inputs = ops.draw(parts, self.plan)
        calls = ops.contenders(parts, inputs, self.backend, self.compiler)
        wrong = ops.failures(parts, inputs, calls)
        for name, reason in wrong.items():
            print(f"{case.label}: {name} is wrong: {reason}", flush=True)
        refused = self._ours(set(wrong), "ours", case.label)
        rows = []
        for what, every in calls.items():
            chosen = {n: c for n, c in every.items() if n not in wrong or not n.startswith("ours")}
            moved = eager_bytes(every["eager"])
            clock = self.plan.clock(inputs.sets)
            timings = interleave({**chosen, "copy": self.copy[0]}, self.rounds, BUDGET_S, clock)
            copied = self.copy[1] / timings.pop("copy").median / 1e6
            least = case.bytes_minimum(what)
            for name, timing in timings.items():
                rate = least / timing.median / 1e6
                rows.append(
                    _shared(case, name, what, timing, timings, set(wrong))
                    | {
                        "input_sets": inputs.sets,
                        "bytes_minimum": least,
                        "bytes_moved": {"eager": moved, "compile": None}.get(name, least),
                        "gb_per_s": rate,
                        "copy_gb_per_s": copied,
                        "copy_share": rate / copied,
                        "environment": self.where,
                    }
                )
        return rows, refused

    def pair(self, case: pairs.PairCase) -> tuple[list[Row], list[str]]:
        """Rows of both passes with peak memory."""
        device = self.plan.device
        pair = case.build(device)
        inputs = pairs.draw(case, pair, device)
        calls = pairs.contenders(case, pair, inputs, self.backend, self.compiler)
        exact, plain = pairs.truth(pair, inputs), calls["eager"][ops.PASSES[1]](0)
        wrong: dict[str, str] = {}
        missing: list[str] = []
        for name, run in list(calls.items()):
            try:
                reason = pairs.failure(run, exact, plain, inputs)
            except Exception as error:
                print(f"{case.label}: {name} does not run: {type(error).__name__}: {error}", flush=True)
                del calls[name]
                # Whether a patched block compiles is a question, and no is an answer.
                missing += [f"{case.label} ({name})"] if not name.endswith("compile") else []
                continue
            if reason is not None:
                print(f"{case.label}: {name} is wrong: {reason}", flush=True)
                wrong[name] = reason
        missing += self._ours(set(wrong), "patched", case.label)
        calls = {name: run for name, run in calls.items() if name not in wrong or not name.startswith("patched")}
        del exact, plain
        rows = []
        for what in ops.PASSES:
            peaks = {name: pairs.peak_bytes(run[what], device) for name, run in calls.items()}
            clock: Clock = PatientClock(1) if device.type == "cuda" else self.plan.clock(1)
            timings = interleave({n: run[what] for n, run in calls.items()}, self.rounds, BUDGET_S, clock)
            for name, timing in timings.items():
                rows.append(
                    _shared(case, name, what, timing, timings, set(wrong))
                    | {
                        "input_sets": 1,
                        "peak_bytes": peaks[name],
                        "attention": pairs.ATTENTION,
                        "environment": self.where,
                    }
                )
        return rows, missing


def table(rows: list[Row]) -> str:
    """What a reader wants at a glance."""
    head = f"{'op':30}{'form':22}{'model':14}{'pass':20}{'contender':30}{'ms':>9}{'copy':>7}{'peak GiB':>10}"
    lines = [head + f"{'x eager':>10}{'x compile':>11}"]
    for r in rows:
        share = f"{r['copy_share']:7.0%}" if "copy_share" in r else " " * 7
        peak = f"{r['peak_bytes'] / 2**30:10.2f}" if r.get("peak_bytes") is not None else " " * 10
        times = "".join(
            " " * width if r[key] is None else f"{r[key]:{width}.2f}"
            for key, width in (("times_eager", 10), ("times_compile", 11))
        )
        mark = "" if r["within_budget"] else "  off budget"
        lines.append(
            f"{r['op']:30}{r['form']:22}{r['model']:14}{r['pass']:20}{r['backend']:30}{r['ms_median']:9.3f}"
            f"{share}{peak}{times}{mark}"
        )
    return "\n".join(lines)


def planned(dry: bool) -> list[Any]:
    """HunyuanVideo's ops, then the blocks, then the other ops: time may run out."""
    every = list(ops.cases(dry))
    first = [case for case in every if case.model == ops.HUNYUAN]
    blocks = pairs.cases(dry)
    compiled = [case for case in blocks if case.form == pairs.COMPILED]
    others = [case for case in every if case not in first]
    # Patched blocks in a compiler have tests of their own.
    return [*first, *(case for case in blocks if case not in compiled), *others, *([] if dry else compiled)]


def _is_ours(line: str) -> bool:
    return "pass" in json.loads(line)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.blocks", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "dry"), default="cuda", help="dry: a few CPU elements")
    parser.add_argument("--only", default="", help="only cases whose name contains this, such as HunyuanVideo")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case that would not end within them")
    parser.add_argument("--out", type=Path, help="results file; rows of others in it are kept")
    options = parser.parse_args()
    begin = time.monotonic()
    if options.device == "dry":
        torch.set_num_threads(1)
    plan = PLANS[options.device]()
    backend = plan.implementations.get("ours, triton")
    if backend is None:
        sys.exit(f"nothing is measured: {plan.missing['ours, triton']}")
    run = Measurement(options.device, options.rounds, backend, plan)
    print("  ".join(f"{k} {v}" for k, v in run.where.items()), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        before = options.out.read_text().splitlines(keepends=True) if options.out.exists() else []
        options.out.write_text("".join(line for line in before if not _is_ours(line)))

    rows: list[Row] = []
    failed: list[str] = []
    not_reached: list[str] = []
    for case in planned(options.device == "dry"):
        if options.only not in case.label:
            continue
        if time.monotonic() - begin + case.seconds > options.seconds:
            not_reached.append(case.label)
            continue
        started = time.monotonic()
        try:
            new, refused = run.op(case) if isinstance(case, ops.Case) else run.pair(case)
        except Exception as error:
            # What the other cases show is worth having.
            print(f"{case.label}: not measured: {type(error).__name__}: {error}", flush=True)
            new, refused = [], [f"{case.label} (an error)"]
        rows += new
        failed += refused
        if options.out is not None:
            with options.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
        print(f"{case.label}: {time.monotonic() - started:.0f} s", flush=True)
        # The next case needs the memory.
        torch._dynamo.reset()
        gc.collect()
        if plan.device.type == "cuda":
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
