"""What `dancegrpo-fast run` adds to the start of a script: `python -m bench.startup`."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

STEP = """
def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver): ...
"""
# Each defines a step function, without which earlier versions run nothing; none calls it.
SCRIPTS = {
    "nothing": "",
    "torch": "import torch",
    "diffusers": "import torch\nfrom diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel",
}
ROOT = Path(__file__).resolve().parents[1]


def measure(commands: Mapping[str, tuple[Sequence[str], str]], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each command in each round; the commands take turns, after one round that warms the disk's cache.

    Args:
        commands: words and PYTHONPATH by name.
        folder: where they run.
        rounds: how many are measured.

    Raises:
        RuntimeError: a command failed; with what it said.
    """
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (words, path) in commands.items():
            start = time.perf_counter()
            done = subprocess.run(
                words, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)} (PYTHONPATH={path}) failed: {done.stderr[-2000:]}")
            if number:
                times[name].append(seconds)
    return times


def main() -> None:
    """Prints a table of medians, in milliseconds."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--old", metavar="PATH", help="PYTHONPATH of another version, measured beside this one")
    parser.add_argument("--old-python", metavar="FILE", default=sys.executable, help="its interpreter")
    given = parser.parse_args()
    run = ("-m", "dancegrpo_fast.cli", "run")
    inherited = os.environ.get("PYTHONPATH", "")
    mine = os.pathsep.join(filter(None, [str(ROOT), inherited]))
    columns = ["script imports", "python", "run", "run adds", *(["other version", "it adds"] if given.old else [])]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "train.py").write_text(SCRIPTS[name] + STEP)
            commands = {
                "python": ((sys.executable, "train.py"), inherited),
                "run": ((sys.executable, *run, "train.py"), mine),
            }
            if given.old:
                commands["old"] = ((given.old_python, *run, "train.py"), given.old)
            times = measure(commands, Path(folder), given.rounds)
        medians = {key: 1000 * statistics.median(values) for key, values in times.items()}
        cells = [name, *(f"{medians[key]:.0f} ms" for key in ("python", "run"))]
        cells.append(f"{medians['run'] - medians['python']:+.0f} ms")
        if given.old:
            cells += [f"{medians['old']:.0f} ms", f"{medians['old'] - medians['python']:+.0f} ms"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
