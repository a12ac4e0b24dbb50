"""Whether everything runs at all and agrees with the CPU: one shape of each op, a line each as soon as it is known.

`python -m bench.gpu.smoke`: parts run in processes of their own at the same time, as compiling is most of their work.
They start before anything large is imported here.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ..rows import Row, add, drop

# As in `first_calls.parts`: of Triton a process a check, which compiles what it needs.
CHECKS = ("step", "seeded step", "score", "loss", "ratio", "graph", "side stream")
BLOCK_OPS = ("norm", "gated norm", "gate", "rope of two streams", "rope over tokens", "gelu behind a prefix")
PARTS = ("cuda", *(f"triton, {name}" for name in CHECKS), *(f"block op, {name}" for name in BLOCK_OPS))
PARTS += ("block op, graph of gelu",)


def _is_mine(row: Row) -> bool:
    return row["op"] in ("smoke", "scalar order")


def run_parts(parts: list[str], dry: bool, out: Path | None) -> bool:
    """In this process; whether all agree."""
    import torch

    from ..environment import environment
    from . import first_calls

    if dry:
        torch.set_num_threads(1)
    where, every = environment(torch.device("cpu" if dry else "cuda"), dry=dry), first_calls.parts(dry)
    results = [first_calls.run_part(part, every[part], out, where) for part in parts]
    return all(results)


def say_what_is_here(dry: bool, out: Path | None) -> None:
    """Versions and backends, and how the device rounds a scalar in a product."""
    import torch

    from dancegrpo_fast import info

    from ..environment import environment
    from .scalars import scalar_orders

    print(info.describe(), flush=True)
    device = torch.device("cpu" if dry else "cuda")
    where = environment(device, dry=dry)
    for row in scalar_orders(device):
        add(out, [{"case": f"scalar order: {row['scalar']}, {row['order']}", **row, "environment": where}])
        print(f"{row['order']}, scalar {row['scalar']}: {row['rounding']} on {device}", flush=True)


def run_in_processes(command: list[str], jobs: int, dry: bool, out: Path | None) -> bool:
    """A process a part, at most `jobs` at once; whether all agree."""
    waiting, running = list(PARTS), [subprocess.Popen([*command, part]) for part in PARTS[:jobs]]
    del waiting[:jobs]
    say_what_is_here(dry, out)
    good = True
    while running:
        good &= running.pop(0).wait() == 0
        if waiting:
            running.append(subprocess.Popen([*command, waiting.pop(0)]))
    return good


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "dry"), default="cuda", help="dry: the same bodies on the CPU")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--out", type=Path, help="results file; rows of others in it are kept")
    options = parser.parse_args()
    dry = options.device == "dry"
    if options.part is not None:
        sys.exit(not run_parts([options.part], dry, options.out))
    if options.out is not None:
        drop(options.out, _is_mine)
    if options.jobs == 1:
        say_what_is_here(dry, options.out)
        good = run_parts(list(PARTS), dry, options.out)
    else:
        command = [sys.executable, "-m", "bench.gpu.smoke", "--device", options.device]
        command += [] if options.out is None else ["--out", str(options.out)]
        good = run_in_processes([*command, "--part"], options.jobs, dry, options.out)
    print("everything agrees" if good else "something does not agree, see above")
    sys.exit(not good)


if __name__ == "__main__":
    main()
