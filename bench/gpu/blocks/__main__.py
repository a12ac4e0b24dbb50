"""Verifies, measures, writes one JSON line a row and prints a table."""

import argparse
import gc
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...clocks import Clock, DeviceClock, Run
from ...harness import Timing, copy_contender, environment, interleave
from ...plan import PLANS, Plan
from ...report import eager_bytes
from ...rows import Row, Rows
from . import ops, pairs

Case = ops.Case | pairs.PairCase
ROUNDS = 5
# Of a contender in a round.
BUDGET_S = 0.02
# Of the time, what compiling in many processes may take.
WARM_SHARE = 0.35


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

    def warm(self, case: Case) -> None:
        """Compiles what a case compiles, which later processes find in the compilers' caches."""
        device = self.plan.device
        if isinstance(case, ops.Case):
            parts = case.build(device, case.sizes)
            calls = ops.contenders(parts, ops.draw(parts, self.plan), self.backend, self.compiler)
            for every in calls.values():
                for run in every.values():
                    run(0)
            return
        pair = case.build(device)
        found = pairs.contenders(case, pair, pairs.draw(case, pair, device), self.backend, self.compiler)
        for runs in found.values():
            runs[ops.PASSES[0]](0)
            runs[ops.PASSES[1]](0)

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
        saved = {name: pairs.saved_bytes(run[pairs.GRAPH], device) for name, run in calls.items()}
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
                        "saved_bytes": saved[name],
                        "attention": pairs.ATTENTION,
                        "environment": self.where,
                    }
                )
        return rows, missing


def table(rows: list[Row]) -> str:
    """What a reader wants at a glance."""
    head = (
        f"{'op':30}{'form':22}{'model':14}{'pass':20}{'contender':30}{'ms':>9}{'copy':>7}{'peak':>8}{'saved GiB':>10}"
    )
    lines = [head + f"{'x eager':>10}{'x compile':>11}{'host us':>9}"]
    for r in rows:
        share = f"{r['copy_share']:7.0%}" if "copy_share" in r else " " * 7
        gib = [r.get(key) and r[key] / 2**30 for key in ("peak_bytes", "saved_bytes")]
        sizes = "".join(" " * w if g is None else f"{g:{w}.2f}" for g, w in zip(gib, (8, 10), strict=True))
        times = "".join(
            " " * width if r[key] is None else f"{r[key]:{width}.2f}"
            for key, width in (("times_eager", 10), ("times_compile", 11))
        )
        host = f"{r['host_us_median']:9.1f}" if "host_us_median" in r else " " * 9
        mark = "" if r["within_budget"] else "  off budget"
        lines.append(
            f"{r['op']:30}{r['form']:22}{r['model']:14}{r['pass']:20}{r['backend']:30}{r['ms_median']:9.3f}"
            f"{share}{sizes}{times}{host}{mark}"
        )
    return "\n".join(lines)


def planned(dry: bool) -> list[Case]:
    """HunyuanVideo's ops, then the blocks, then the other ops: time may run out."""
    every: list[Case] = list(ops.cases(dry))
    first = [case for case in every if case.model == ops.HUNYUAN]
    blocks = pairs.cases(dry)
    compiled = [case for case in blocks if case.form == pairs.COMPILED]
    others = [case for case in every if case not in first]
    # Patched blocks in a compiler have tests of their own.
    return [*first, *(case for case in blocks if case not in compiled), *others, *([] if dry else compiled)]


def compile_ahead(labels: list[str], device: str, jobs: int, seconds: float) -> None:
    """A process a case, at most `jobs` at once; what is not through in time compiles when it is measured."""
    begin, waiting = time.monotonic(), list(labels)
    running: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-m", __package__, "--device", device, "--warm", "--only"]
    while waiting or running:
        if time.monotonic() - begin > seconds:
            for process in running:
                process.kill()
            break
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < jobs:
            running.append(subprocess.Popen([*command, waiting.pop(0)], stdout=subprocess.DEVNULL))
        time.sleep(0.1)
    for process in running:
        process.wait()
    print(f"compiled ahead: {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.blocks", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "dry"), default="cuda", help="dry: a few CPU elements")
    parser.add_argument("--only", default="", help="only cases whose name contains this, such as HunyuanVideo")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case that would not end within them")
    parser.add_argument("--out", type=Path, help="results file; rows of others in it are kept")
    parser.add_argument("--resume", action="store_true", help="keep what --out has already")
    parser.add_argument("--jobs", type=int, default=1, help="compile in so many processes first; 1: in this one")
    parser.add_argument("--warm", action="store_true", help="only compile")
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
    rows = Rows(options.out, lambda row: "pass" in row, options.resume)
    cases = [c for c in planned(options.device == "dry") if options.only in c.label and c.label not in rows.done]
    if options.warm:
        for case in cases:
            run.warm(case)
        return
    if options.jobs > 1:
        reached, ahead = 0.0, []
        for case in cases:
            reached += case.seconds
            ahead += [case.label] if reached < 2.0 * options.seconds else []
        compile_ahead(ahead, options.device, options.jobs, WARM_SHARE * options.seconds)
    failed: list[str] = []
    not_reached: list[str] = []
    for case in cases:
        needed = case.seconds if options.jobs == 1 else 0.5 * case.seconds
        if time.monotonic() - begin + needed > options.seconds:
            not_reached.append(case.label)
            continue
        started = time.monotonic()
        try:
            new, refused = run.op(case) if isinstance(case, ops.Case) else run.pair(case)
        except Exception as error:
            # What the other cases show is worth having.
            print(f"{case.label}: not measured: {type(error).__name__}: {error}", flush=True)
            new, refused = [], [f"{case.label} (an error)"]
        rows.add(case.label, new)
        failed += refused
        print(f"{case.label}: {time.monotonic() - started:.0f} s", flush=True)
        # The next case needs the memory.
        torch._dynamo.reset()
        gc.collect()
        if plan.device.type == "cuda":
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
