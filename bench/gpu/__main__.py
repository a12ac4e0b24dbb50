"""Tests, checks and measures on a GPU in eight minutes, without network, facts in the order of their worth."""

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from ..repository import ROOT, commit, slug
from ..rows import read
from .expectations import JUDGES, Evidence, Verdict
from .gate import FAILED, LOG, SUMMARY, TESTS, Gate, Outcome, Summary, unfinished
from .ledger import Publisher, jobs_of
from .modules import bring, copy_sources, prepare, unpack
from .process import Runner
from .stages import EVERY, LATER, SECONDS, SECONDS_AGAIN, STAGES, seconds_of

AGAIN = "failed"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench/gpu_gate.sh", description=__doc__)
    parser.add_argument(
        "--only", help=f'comma-separated stages ({", ".join(EVERY)}), or "failed": what the last run left, and `more`'
    )
    parser.add_argument("--last", type=Path, help="folder of the last run's files (default: where this one writes)")
    parser.add_argument("--prebuilt", type=Path, help="folder of compiled modules, which are not built then")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use, such as --prepare fetches")
    parser.add_argument("--prepare", type=Path, help="only fill this folder with such modules and wheels")
    parser.add_argument("--architectures", default="90", help="of --prepare, such as 80,90 (default 90)")
    parser.add_argument("--dry", action="store_true", help="everything that runs without a GPU, on tiny inputs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--seconds", type=int, help=f"limit of the whole gate (default {SECONDS}, or {SECONDS_AGAIN})")
    parser.add_argument("--commit", help="what is tested, where the repository is not there to be asked")
    options = parser.parse_args(arguments)
    names = [*STAGES] if options.only is None else options.only.split(",")
    if options.only != AGAIN and (unknown := [name for name in names if name not in EVERY]):
        parser.error(f"--only: got {', '.join(unknown)}, want {AGAIN} or some of {', '.join(EVERY)}")
    for name in ("last", "prebuilt", "wheels", "prepare"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name}: got {folder}, want a folder")
    options.stages = names
    options.seconds = options.seconds or (SECONDS_AGAIN if options.only == AGAIN else SECONDS)
    return options


def last_summary(folder: Path) -> dict[str, Any]:
    """Of the last run.

    Raises:
        SystemExit: there is none.
    """
    path = folder / SUMMARY
    if not path.exists():
        sys.exit(f"--only {AGAIN}: got no {SUMMARY} in {folder}, want the files of a run; --last says where they are")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def start_again(options: argparse.Namespace, out: Path) -> tuple[list[str], str]:
    """What a second run does, and the results file that it goes on with; the last run's files are in `out` then."""
    last = last_summary(options.last or out)
    if options.last is not None and options.last.resolve() != out.resolve():
        for name in (last["rows"], TESTS):
            if (options.last / name).exists():
                shutil.copy2(options.last / name, out / name)
    left = unfinished(last)
    # Modules are not kept.
    names = ["modules", *(name for name in left if name != "modules"), *(name for name in LATER if name not in left)]
    return names, str(last["rows"])


def run_stage(gate: Gate, name: str) -> Outcome:
    """One stage within its limit; an error of the gate itself fails this stage only."""
    if min(gate.runner.deadline, gate.runner.stage_ends) - time.monotonic() < 1.0:
        return FAILED, "no time was left"
    gate.runner.say(f"\n=== {name}")
    try:
        return EVERY[name].run(gate)
    except Exception:
        gate.runner.say(traceback.format_exc())
        return FAILED, "the gate itself failed, see above"


def judge(gate: Gate, name: str) -> list[Verdict]:
    """What the rows and tests up to now show of a stage's claims."""
    if gate.dry or name not in JUDGES:
        return []
    verdicts = JUDGES[name](Evidence(read(gate.rows), read(gate.out / TESTS), jobs_of(gate.repository)))
    gate.runner.say("\n".join(map(str, verdicts)))
    return verdicts


def run_all(gate: Gate, summary: Summary, limits: dict[str, float]) -> None:
    """Every stage; what is known lies on disk before and behind each."""
    publish = (lambda: None) if gate.dry else Publisher(gate, summary).write
    ends = time.monotonic()
    for name, seconds in limits.items():
        ends += seconds
        gate.runner.stage_ends = ends
        summary.begin(name)
        publish()
        begin = time.monotonic()
        outcome = run_stage(gate, name)
        took = time.monotonic() - begin
        summary.end(name, outcome, took, judge(gate, name))
        gate.runner.say(f"{outcome[0]}: {name}, {took:.0f} s: {outcome[1]}")
    summary.finish()
    publish()


def private_tree(build: Path) -> Path:
    """A new folder; those of gates that were killed are removed."""
    build.mkdir(exist_ok=True)
    for left in build.glob("gpu-gate-*-*"):
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"gpu-gate-{os.getpid()}-", dir=build))


def main() -> None:
    """Command line."""
    begin = time.monotonic()
    options = parse()
    # So that what was started is ended, and the summary says how far it came.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    build = ROOT / "build"
    # Only what lies under $OUT comes back from a machine that is lent for one command.
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else build / "gpu-gate-out"
    out.mkdir(parents=True, exist_ok=True)
    again = options.only == AGAIN
    names, rows = start_again(options, out) if again else (options.stages, "")
    tree = private_tree(build)
    measured = options.commit or commit()
    variables = {"BENCH_COMMIT": measured}
    runner = Runner(tree, out / LOG, begin + options.seconds, begin + options.seconds, extra=variables)
    gate = Gate(ROOT, out, out, options.dry, options.jobs, runner, options.prebuilt, resume=again)
    if not again:
        for name in (SUMMARY, TESTS):
            (out / name).unlink(missing_ok=True)
    runner.log.write_text("")
    try:
        copy_sources(ROOT, tree)
        if options.prepare is not None:
            if problem := prepare(gate, options.prepare, options.architectures):
                sys.exit(problem)
            runner.say(f"in {options.prepare}: {', '.join(sorted(p.name for p in options.prepare.iterdir()))}")
            return
        if options.wheels is not None:
            runner.packages = tree / "site"
            runner.say(f"packages: {', '.join(unpack(options.wheels, runner.packages)) or 'no wheel'}")
        if problem := bring(gate):
            sys.exit(problem)
        if not options.dry and not gate.found["gpu"]:
            sys.exit("torch sees no CUDA device; --dry runs what needs none")
        machine = "dry" if options.dry else slug(gate.found["gpu"]["name"])
        now = datetime.datetime.now(datetime.UTC)
        gate.rows = out / (rows or f"gpu-{machine}-{now:%Y-%m-%d}.jsonl")
        if not again:
            gate.rows.unlink(missing_ok=True)
        found = gate.found
        head = {
            "started": now.isoformat(timespec="seconds"),
            "commit": measured,
            "machine": f"{machine}, Python {found['python']}, torch {found['torch']}, Triton {found['triton']}",
            "command": " ".join(["bench/gpu_gate.sh", *sys.argv[1:]]),
            "dry": options.dry,
            "rows": gate.rows.name,
        }
        prebuilt = options.dry or (options.prebuilt is not None and not gate.refused)
        left = options.seconds - (time.monotonic() - begin)
        summary = Summary(out, head, names)
        runner.say(f"commit {measured}, {head['machine']}")
        try:
            # A dry run is no measurement of the stages.
            limits = dict.fromkeys(names, left) if options.dry else seconds_of(names, prebuilt, left)
            run_all(gate, summary, limits)
        finally:
            summary.write()
            runner.say("\n" + "\n".join(summary.lines()))
            runner.say(f"{time.monotonic() - begin:.0f} s in all; files in {out}")
        failed = bool(summary.failed or summary.missed)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
