"""Times recipes' iterations beside plain loops of the same mathematics, counts them, and draws the first's curves."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.environment import environment
from bench.repository import RESULTS
from bench.rows import Row, grid, write
from dancegrpo_fast.memory import profile
from dancegrpo_fast.models import load_model
from dancegrpo_fast.prompts import load_prompts
from dancegrpo_fast.recipe import LoraSettings, Recipe, load_recipe
from dancegrpo_fast.rng import derive_seed
from dancegrpo_fast.train.loop import Trainer
from tests.gpu.activity import FREE

from . import figure
from .plain import PlainLoop

# A flow transformer, the same with LoRA, a guided UNet, and a video transformer; with `-lora` LoRA layers are added.
RECIPES = ("digits", "digits-lora", "digits_ddim", "video_motion")
LORA = LoraSettings(rank=8, alpha=8)
# On a GPU each of these makes the host wait for the device.
READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "equal",
    "allclose",
)
NOTES = """\
ours: two passes, calls of the recipe's micro-batch; small calls: of one prompt's samples, as batched has them
retain, reweight: ours in one pass, `train.passes`
plain: the published scripts' loop in plain torch: batch 1, a host read and a reduction per micro-step, picture files
batched: the same plain torch with a prompt's samples in one batch, no reads or reductions per step
GFLOP: products and attention of the third iteration, by torch's counter
launches: torch operators of the third iteration that would start work on a device (ours count once)
host reads: its calls at which a GPU would be waited for, those on numbers that lie on the host included
peak: live tensor bytes of the contender alone, model and optimiser included"""


# Rows of a model call, and iteration, which returns the mean of the first reward.
Contender = tuple[int, Callable[[int], float]]


class Reads(TorchFunctionMode):
    """Counts what hands a tensor's values to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Counts operators that would start work on a device; an op of ours is one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("aten", "dgf") and func.name().partition("::")[2].partition(".")[0] not in FREE
        return func(*args, **(kwargs or {}))


def contenders(recipe: Recipe, folder: Path) -> dict[str, Callable[[], Contender]]:
    """What makes them, by name."""
    prompts, group = load_prompts(recipe.prompts), recipe.train.group_size

    def ours(**changes: Any) -> Contender:
        train = replace(recipe.train, **changes)
        name = "-".join(map(str, changes.values())) or "ours"
        trainer = Trainer(replace(recipe, train=train, output_dir=str(folder / name), evaluation=None))
        first = trainer.rewards.names[0]
        return train.micro_batch, lambda number: float(trainer.iteration(number)[f"reward/{first}"])

    def plain(rows: int) -> Contender:
        # As the trainer draws the first LoRA layers.
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        model = load_model(recipe, torch.device("cpu"), prompts)
        model.denoiser.eval()
        pictures = folder / f"pictures{rows}"
        pictures.mkdir(parents=True)
        return rows, PlainLoop(recipe, model, prompts, pictures, rows).iteration

    one_pass = {"retain": partial(ours, passes="retain")}
    if recipe.model.lora is not None:
        one_pass["reweight"] = partial(ours, passes="reweight")
    return {
        "ours": ours,
        "small calls": partial(ours, micro_batch=group),
        **one_pass,
        "batched": partial(plain, group),
        "plain": partial(plain, 1),
    }


def changed(name: str, iterations: int) -> Recipe:
    """A recipe by its name, with one update an iteration and, with `-lora`, LoRA layers."""
    recipe, _ = load_recipe([str(Path("recipes") / f"{name.removesuffix('-lora')}.yaml")])
    recipe = replace(recipe, train=replace(recipe.train, iterations=iterations, updates_per_rollout=1))
    return replace(recipe, model=replace(recipe.model, lora=LORA)) if name.endswith("-lora") else recipe


def timed(name: str, iterations: int, beside: int, where: dict[str, Any]) -> list[Row]:
    """One row per contender: seconds of every iteration, and the reward curve. The machine must be idle.

    Args:
        name: of the recipe.
        iterations: of all but the plain loop.
        beside: the first of them, in which that takes its turn; medians are of those.
        where: what ran it.
    """
    recipe = changed(name, iterations)
    with tempfile.TemporaryDirectory() as folder:
        runs = {contender: make() for contender, make in contenders(recipe, Path(folder)).items()}
        seconds: dict[str, list[float]] = {contender: [] for contender in runs}
        curves: dict[str, list[float]] = {contender: [] for contender in runs}
        for number in range(1, iterations + 1):
            names = [contender for contender in runs if contender != "plain" or number <= beside]
            # Another one begins every time, so that none always runs on a machine warmed by the same other.
            turn = number % len(names)
            for contender in names[turn:] + names[:turn]:
                begin = time.perf_counter()
                curves[contender].append(runs[contender][1](number))
                seconds[contender].append(time.perf_counter() - begin)
            print(f"{name} {number}: " + ", ".join(f"{c} {seconds[c][-1]:.2f} s" for c in names), flush=True)
        return [
            {
                "op": "iteration",
                "recipe": name,
                "contender": contender,
                "seconds_median": statistics.median(seconds[contender][:beside]),
                "seconds": seconds[contender],
                "reward": curves[contender],
                "samples": recipe.train.prompts_per_iteration * recipe.train.group_size,
                "micro_batch": calls_of,
                "threads": torch.get_num_threads(),
                "environment": where,
            }
            for contender, (calls_of, _) in runs.items()
        ]


def counted(name: str, peak_of_plain: bool) -> list[Row]:
    """Of each contender, peak bytes, FLOPs, launches and reads of an iteration, whatever else the machine does."""
    recipe, rows = changed(name, 3), []
    with tempfile.TemporaryDirectory() as folder:
        # One after another: no other's weights lie beside the peak.
        for contender, make in contenders(recipe, Path(folder)).items():
            _, run = make()
            run(1)
            row: Row = {"peak_bytes": None, "peak_phase": None}
            if contender != "plain" or peak_of_plain:
                with profile() as report:
                    run(2)
                row = {"peak_bytes": report.peak.bytes, "peak_phase": report.peak.name}
            with FlopCounterMode(display=False) as flops, Launches() as launches, Reads() as reads:
                run(3)
            rows.append(row | {"launches": launches.count, "host_reads": reads.count, "flops": flops.get_total_flops()})
            del run
    return rows


def table(rows: list[Row]) -> str:
    """A markdown table."""
    cells = []
    for row in rows:
        seconds = row["seconds_median"]
        plain = next(r for r in rows if r["recipe"] == row["recipe"] and r["contender"] == "plain")
        times = f"{plain['seconds_median'] / seconds:.1f}x"
        mib = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        last = len(plain["reward"]) - 1
        counts = [f"{row['flops'] / 1e9:.1f}", row["launches"], row["host_reads"], mib, f"{row['reward'][last]:.4f}"]
        cells.append([row["recipe"], row["contender"], row["micro_batch"], f"{seconds:.2f}", times, *counts])
    titles = (
        "recipe, contender, rows a call, s an iteration, against plain, GFLOP, launches, host reads, peak MiB, "
        "reward behind plain's last"
    )
    head = titles.split(", ")
    return "\n".join(grid(head, cells))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.iteration", description=__doc__)
    parser.add_argument("--recipe", action="append", help=f"default {' and '.join(RECIPES)}; their bases must be built")
    parser.add_argument("--iterations", type=int, default=120, help="of the first recipe, in which it learns (120)")
    parser.add_argument("--beside", type=int, default=6, help="of the others, and of the plain loop (6)")
    parser.add_argument("--peak-of-plain", action="store_true", help="too, up to an hour for each recipe")
    parser.add_argument("--out", type=Path, default=RESULTS / "iteration.jsonl")
    options = parser.parse_args()
    # The scripts reduce and wait in every micro-step; one process is the least that this can cost.
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}.store", rank=0, world_size=1)
    where = environment()
    rows: list[Row] = []
    names = options.recipe or RECIPES
    for name in names:
        rows += timed(name, options.iterations if name == names[0] else options.beside, options.beside, where)
    write(options.out, rows)
    print("timed; the rest is counted, and needs no idle machine", flush=True)
    for name in names:
        mine = [row for row in rows if row["recipe"] == name]
        for row, counts in zip(mine, counted(name, options.peak_of_plain), strict=True):
            row.update(counts)
        write(options.out, rows)
    figure.draw([row for row in rows if row["recipe"] == names[0]], options.out.with_suffix(".png"))
    print(f"\n{table(rows)}\n\n{NOTES}\n\n{len(rows)} rows in {options.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
