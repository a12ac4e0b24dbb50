"""`python -m bench.seeds RECIPE --seeds 20 21 22`: a recipe on several seeds, beside the same with other settings.

    python -m bench.seeds recipes/digits.yaml --seeds 20 21 22 --setting "constant=--train.schedule constant"

Each run is a process of one thread in a folder of its own, `--jobs` at a time; one that has ended is not run again. The
table has what ODE samples score before and after, and the diversity that is left of theirs, as mean and standard
deviation over the seeds.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .environment import environment
from .rows import Row, grid, read, write

AS_IT_IS = "recipe"


def train(recipe: Path, folder: Path, seed: int, options: str) -> None:
    """A run, or what is missing of it.

    Raises:
        RuntimeError: it failed; it names its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = ["--seed", str(seed), "--output_dir", str(folder), "--threads", "1", "--resume", "auto"]
    command = [sys.executable, "-m", "dancegrpo_fast.cli", "train", str(recipe), *own, *shlex.split(options)]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environ, check=False).returncode:
            raise RuntimeError(f"{folder} did not end: see {log.name}")


def outcome(folder: Path) -> Row:
    """Scores and diversities of the first and the last evaluation by ODE, as `name: [before, after]`."""
    rows = [row for row in read(folder / "evaluations.jsonl") if row["sampler"] == "ode"]
    first, last = rows[0], rows[-1]
    found = {name: [first[name], last[name]] for name in last if name not in ("iteration", "sampler")}
    return {"iterations": last["iteration"], **found}


def table(rows: Sequence[Row]) -> list[str]:
    """A line a setting; diversities after in percent of those before."""
    names = [name for name in rows[0]["outcome"] if name != "iterations"]
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        cells = []
        for name in names:
            pairs = [row["outcome"][name] for row in mine]
            if name.startswith("diversity"):
                cells.append(_spread([100 * after / before for before, after in pairs], 0) + " %")
            else:
                cells.append(
                    f"{statistics.mean(before for before, _ in pairs):.3f} -> {_spread([p[1] for p in pairs], 3)}"
                )
        lines.append([setting, " ".join(str(row["seed"]) for row in mine), *cells])
    return grid(["settings", "seeds", *names], lines)


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> int:
    """Runs what has not run, writes the rows, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--setting", action="append", default=[], help="NAME=OVERRIDES, run beside the recipe as it is")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path, help="writes a row a run")
    given = parser.parse_args()
    settings = {AS_IT_IS: ""} | dict(text.split("=", 1) for text in given.setting)
    runs = [(name, seed) for seed in given.seeds for name in settings]
    folders = {run: given.folder / f"{given.recipe.stem}-{run[0]}-{run[1]}" for run in runs}
    with ThreadPoolExecutor(given.jobs) as pool:
        started = [pool.submit(train, given.recipe, folders[run], run[1], settings[run[0]]) for run in runs]
        for one in started:
            one.result()
    where = environment()
    rows = [
        {
            "recipe": str(given.recipe),
            "setting": name,
            "options": settings[name],
            "seed": seed,
            "outcome": outcome(folders[name, seed]),
            "environment": where,
        }
        for name, seed in runs
    ]
    if given.json:
        write(given.json, rows)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
