"""Builds, tests, checks and measures on a GPU: `bench/gpu_gate.sh`. No network is needed."""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .. import slug
from .process import Runner
from .stages import FAILED, STAGES, Gate, Outcome, copy_sources

REPOSITORY = Path(__file__).resolve().parents[2]
# Of the whole gate, somewhat less than the ten minutes that a command may take where such machines are lent.
SECONDS = 570
_ASK = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.major * 10 + p.minor, sep='|')"


def device() -> tuple[str, str] | None:
    """Name and compute capability of the GPU, asked in a process that ends: no context stays on the device."""
    found = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
    if found.returncode != 0:
        return None
    name, _, capability = found.stdout.strip().splitlines()[-1].partition("|")
    return slug(name), capability


def git_commit() -> str:
    """The commit, where there is a repository."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "no git"
    return found.stdout.strip() or "no git repository"


def run_stage(gate: Gate, name: str) -> tuple[Outcome, float]:
    """One stage within its limit; an error of the gate itself fails this stage only."""
    begin = time.monotonic()
    if gate.runner.deadline - begin < 5.0:
        return (FAILED, "no time was left"), 0.0
    gate.runner.stage_ends = begin + STAGES[name].seconds
    gate.runner.say(f"\n=== {name}")
    try:
        outcome = STAGES[name].run(gate)
    except Exception:
        gate.runner.say(traceback.format_exc())
        outcome = FAILED, "the gate itself failed, see above"
    return outcome, time.monotonic() - begin


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench/gpu_gate.sh", description=__doc__)
    parser.add_argument("--only", help="comma-separated stages: " + ", ".join(STAGES))
    parser.add_argument("--dry", action="store_true", help="everything that runs without a GPU, on tiny inputs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of the whole gate")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(STAGES)
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--only: got {', '.join(unknown)}, want some of {', '.join(STAGES)}")
    begin = time.monotonic()
    gpu = None if options.dry else device()
    if gpu is None and not options.dry:
        sys.exit("torch sees no CUDA device; --dry runs what needs none")
    name, capability = gpu or ("dry", "90")
    # Only what lies under $OUT comes back from a machine that is lent for one command.
    build = REPOSITORY / "build"
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else build / "gpu-gate-out"
    out.mkdir(parents=True, exist_ok=True)
    rows = out / f"gpu-{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.jsonl"
    log = out / "gpu-gate.log"
    log.write_text("")
    build.mkdir(exist_ok=True)
    tree = Path(tempfile.mkdtemp(prefix="gpu-gate-", dir=build))
    try:
        copy_sources(REPOSITORY, tree)
        runner = Runner(tree, log, begin + options.seconds)
        gate = Gate(REPOSITORY, out, rows, options.dry, capability, options.jobs, runner, tuple(names))
        runner.say(
            f"commit {git_commit()}, Python {sys.version.split()[0]}, device {name}, compute capability {capability}"
        )
        outcomes = {stage: run_stage(gate, stage) for stage in names}
        if rows.exists() and not options.dry and {"bench", "blocks", "memory"} & set(names):
            shutil.copy2(rows, REPOSITORY / "bench" / "results" / rows.name)
        runner.say("")
        for stage, ((verdict, detail), seconds) in outcomes.items():
            runner.say(f"{verdict:8}{stage:14}{seconds:6.0f} s  {detail}")
        runner.say(f"{time.monotonic() - begin:.0f} s in all; files in {out}")
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    sys.exit(any(verdict == FAILED for (verdict, _), _ in outcomes.values()))


if __name__ == "__main__":
    main()
