"""Draws one figure from a results file: `python -m bench.plot bench/results/cpu-<date>.jsonl`."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "eager": "#9aa5b1",
    "compile": "#5b7fa6",
    "ours": "#d9642c",
    "ours, cuda": "#d9642c",
    "ours, triton": "#e8a87c",
}
TITLES = {
    "step": "sampling step, noise drawn",
    "step_given_noise": "sampling step, noise given",
    "log_prob": "log-probability",
    "policy_loss": "policy loss, forward + backward",
}


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """A panel per op, a group per shape, a bar per backend from fastest to slowest round, on a log scale."""
    rows = [r for r in rows if r.get("backend") in COLOURS and r["op"] in TITLES]
    ops = [op for op in TITLES if any(r["op"] == op for r in rows)]
    names = [name for name in COLOURS if any(r["backend"] == name for r in rows)]
    ours = next(name for name in names if name.startswith("ours"))
    width = 0.81 / len(names)
    figure, panels = plt.subplots(len(ops), 1, figsize=(13, 3.5 * len(ops)), squeeze=False, layout="constrained")
    for panel, op in zip(panels[:, 0], ops, strict=True):
        mine = [r for r in rows if r["op"] == op]
        shapes = sorted({(r["output_dtype"] != "float32", r["batch"] * r["elements"], r["batch"]) for r in mine})
        ratios = [""] * len(shapes)
        for place, name in enumerate(names):
            for x, (low_precision, numel, batch) in enumerate(shapes):
                dtype = "bfloat16" if low_precision else "float32"
                found = [
                    r
                    for r in mine
                    if (r["backend"], r["output_dtype"], r["batch"]) == (name, dtype, batch)
                    and r["batch"] * r["elements"] == numel
                ]
                for r in found:
                    spread = [[r["ms_median"] - r["ms_min"]], [r["ms_max"] - r["ms_median"]]]
                    panel.bar(
                        x + width * (place - (len(names) - 1) / 2),
                        r["ms_median"],
                        0.92 * width,
                        color=COLOURS[name],
                        yerr=spread,
                        ecolor="#33333388",
                        label=name if x == 0 else None,
                    )
                    if name == ours:
                        ratios[x] = f"{r['times_eager']:.3g}x / {r['times_compile']:.3g}x"
        panel.set_yscale("log")
        panel.margins(y=0.12)
        panel.set_ylabel("ms a call")
        panel.set_title(TITLES[op], loc="left", fontsize=11)
        panel.set_xticks(
            range(len(shapes)),
            [
                f"{b} x {n // b:,}\n{'bf16' if low else 'fp32'} output\n{ratio}"
                for (low, n, b), ratio in zip(shapes, ratios, strict=True)
            ],
            fontsize=8,
        )
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False, ncols=len(names), loc="upper left")
    where = rows[0]["environment"]
    threads = f"{where['threads']} thread" + ("" if where["threads"] == 1 else "s")
    place_of_work = where["gpu"] if "gpu" in where else f"{where['cpu']}, {threads}"
    figure.suptitle(
        f"Median ms a call, whiskers fastest to slowest round. Below each shape: eager / {ours} and compile / {ours}\n"
        f"{place_of_work}, torch {where['torch']}, kernels {where['kernels']}, {where['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(out, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="default: the results file with .png")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    out = options.out or options.results.with_suffix(".png")
    draw(rows, out)
    print(out)


if __name__ == "__main__":
    main()
