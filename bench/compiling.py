"""`python -m bench.compiling`: seconds an iteration with and without `model.compile`, and what compiling takes.

Every setting is a process of its own, and they take turns. The first round finds no compiled graphs, the others those
of the first. Iterations are timed without the first one. The bases of the recipes must be built.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from .environment import environment
from .repository import RESULTS
from .rows import Row, grid, write

RECIPES = ("digits", "video_motion", "digits_ddim")
SETTINGS = ("null", "blocks", "whole")


def measure(recipe: str, setting: str, iterations: int, threads: int) -> Row:
    """In this process: seconds of the start, of compiling and of each iteration but the first."""
    from dancegrpo_fast.recipe import load_recipe
    from dancegrpo_fast.train.loop import Trainer

    begin = time.perf_counter()
    overrides = ["--model.compile", setting, "--train.iterations", str(iterations + 1), "--threads", str(threads)]
    found, _ = load_recipe([str(Path("recipes") / f"{recipe}.yaml"), *overrides])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(found, output_dir=folder, evaluation=None, tracking=[]))
        start, rows, seconds = time.perf_counter() - begin, [], []
        for number in range(1, iterations + 2):
            begin = time.perf_counter()
            rows.append(trainer.iteration(number))
            seconds.append(time.perf_counter() - begin)
        trainer.accelerator.end_training()
    compiled = trainer.model.compiled
    return {
        "op": "compiling",
        "recipe": recipe,
        "setting": setting,
        "threads": threads,
        "start_seconds": start,
        "compile_seconds": None if compiled is None else compiled.seconds,
        "with_gradients": None if compiled is None else compiled.with_gradients,
        "seconds": seconds[1:],
        "ratio_deviation": max(row["ratio_first_update_max_dev"] for row in rows),
    }


def _in_turns(recipe: str, settings: Sequence[str], rounds: int, iterations: int, threads: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for number in range(rounds):
            for setting in settings:
                own = ["--one", setting, "--iterations", str(iterations), "--threads", str(threads)]
                command = [sys.executable, "-m", "bench.compiling", "--recipe", recipe, *own]
                environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(threads)}
                done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
                row = cast(Row, json.loads(done.stdout.splitlines()[-1])) | {"round": number}
                print(f"{recipe} {setting} {number}: {statistics.median(row['seconds']):.3f} s", flush=True)
                rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """Medians over the iterations of all rounds."""
    cells: list[list[Any]] = []
    pairs = dict.fromkeys((row["recipe"], row["setting"]) for row in rows)
    medians = {
        pair: statistics.median(s for row in rows if (row["recipe"], row["setting"]) == pair for s in row["seconds"])
        for pair in pairs
    }
    for pair in pairs:
        recipe, setting = pair
        mine = [row for row in rows if (row["recipe"], row["setting"]) == pair]
        taken = [row["compile_seconds"] for row in mine]
        compiled = taken[0] is not None
        warm = f"{statistics.median(taken[1:]):.0f}" if compiled and len(taken) > 1 else "-"
        forward = "-" if not compiled else "the replay's" if mine[0]["with_gradients"] else "without gradients"
        against = f"{medians[recipe, 'null'] / medians[pair]:.2f}x" if (recipe, "null") in medians else "-"
        deviation = max(row["ratio_deviation"] for row in mine)
        cold = f"{taken[0]:.0f}" if compiled else "-"
        cells.append([recipe, setting, f"{medians[pair]:.3f}", against, cold, warm, forward, f"{deviation:g}"])
    head = "recipe, model.compile, s an iteration, speed-up, s to compile, s from the cache, rollout's forward"
    return grid([*head.split(", "), "largest deviation of the ratio"], cells)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiling", description=__doc__)
    parser.add_argument("--recipe", action="append", help=f"default {', '.join(RECIPES)}")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="default: all")
    parser.add_argument("--iterations", type=int, default=6, help="of each process (6)")
    parser.add_argument("--rounds", type=int, default=2, help="the first finds no compiled graphs (2)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "compiling.jsonl")
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    recipes, rows = given.recipe or RECIPES, list[Row]()
    if given.one is not None:
        print(json.dumps(measure(recipes[0], given.one, given.iterations, given.threads)))
        return
    where = environment()
    for recipe in recipes:
        found = _in_turns(recipe, given.setting or SETTINGS, given.rounds, given.iterations, given.threads)
        rows += [row | {"environment": where} for row in found]
        write(given.out, rows)
    print("\n" + "\n".join(table(rows)) + f"\n\n{len(rows)} rows in {given.out}")


if __name__ == "__main__":
    main()
