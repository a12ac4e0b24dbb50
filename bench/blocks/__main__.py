"""Counts every block for every contender, writes one JSON line each, prints a table and draws the figure."""

import argparse
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from bench.environment import environment
from bench.repository import RESULTS
from bench.rows import Row, write

from . import figure
from .compiled import count_compiled
from .configurations import CONFIGURATIONS, Configuration
from .count import Counts, Tally, count

# What is in the table and the figure of each contender, and the setting of `accelerate` that it is.
CONTENDERS = {
    "eager": None,
    "compile": None,
    "patched, none": "none",
    "patched, gelu": "gelu",
    "patched, all": "all",
}
NOTES = """\
counted, not measured: U = bytes / (tokens C 2), all of one block, batch 1
forward, backward: elementwise traffic without matrix products and attention; by operator in the rows, where RMSNorm of
  torch (FLUX, Wan) is dgf_memory.rms_norm, and the sums for gradients of biases, in every backward, are aten.sum
saved: for the backward; frozen: nothing but the tokens needs gradients (LoRA layers would keep their inputs besides)
launches: operators; for compile kernels, of Inductor's fusions for an H100 that was described to it, none was run
patched: mode "fast", by what the backward computes again; "lossless" takes GELU's gradients by three kernels of torch,
  8 U more in a trained block with recompute gelu or all"""


def counted(configuration: Configuration, contender: str, frozen: bool) -> Counts:
    """One row's numbers."""
    with FakeTensorMode():
        if contender == "compile":
            return count_compiled(configuration, frozen)
        return count(configuration, CONTENDERS[contender], frozen)


def _operators(tally: Tally, unit: int) -> dict[str, float]:
    return {name: round(moved / unit, 2) for name, moved in tally.traffic.most_common() if moved >= unit / 200}


def row(configuration: Configuration, contender: str, frozen: bool, where: dict[str, Any]) -> dict[str, Any]:
    """One line of the results."""
    counts, unit = counted(configuration, contender, frozen), configuration.unit
    return {
        "op": "block",
        "model": configuration.model,
        "block": configuration.block,
        "tokens": configuration.tokens,
        "channels": configuration.sizes.channels,
        "contender": contender,
        "parameters": "frozen" if frozen else "trained",
        "unit_bytes": unit,
        "traffic_forward_U": round(counts.forward.bytes / unit, 3),
        "traffic_backward_U": round(counts.backward.bytes / unit, 3),
        "saved_U": round(counts.saved / unit, 3),
        "launches_forward": counts.forward.launches,
        "launches_backward": counts.backward.launches,
        "operators_forward_U": _operators(counts.forward, unit),
        "operators_backward_U": _operators(counts.backward, unit),
        "environment": where,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Counts of each block, trained and frozen."""
    head = f"{'block':37}{'contender':15}{'forward':>8}{'backward':>9}{'saved':>7}{'launches':>12}"
    lines = [head + f"{'frozen: backward':>19}{'saved':>7}", ""]
    frozen = {(r["model"], r["block"], r["contender"]): r for r in rows if r["parameters"] == "frozen"}
    before = None
    for r in rows:
        if r["parameters"] == "frozen":
            continue
        label = f"{r['model']} {r['block']}"
        beside = frozen.get((r["model"], r["block"], r["contender"]))
        lines.append(
            f"{label if label != before else '':37}{r['contender']:15}{r['traffic_forward_U']:8.1f}"
            f"{r['traffic_backward_U']:9.1f}{r['saved_U']:7.1f}"
            f"{r['launches_forward']:>6} +{r['launches_backward']:>4}"
            + (f"{beside['traffic_backward_U']:19.1f}{beside['saved_U']:7.1f}" if beside else "")
        )
        before = label
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.blocks", description=__doc__)
    parser.add_argument("--only", default="", help="only blocks whose name contains this; prints the table alone")
    options = parser.parse_args()
    where = environment()
    rows: list[Row] = []
    for configuration in CONFIGURATIONS:
        if options.only not in f"{configuration.model} {configuration.block}":
            continue
        for contender in CONTENDERS:
            rows += [row(configuration, contender, frozen, where) for frozen in (False, True)]
        print(f"{configuration.model} {configuration.block}: done", flush=True)
    print(table(rows), NOTES, sep="\n\n")
    if options.only:
        return
    out = RESULTS / "blocks-traffic.jsonl"
    write(out, rows)
    figure.draw(rows, out.with_suffix(".png"))
    print(f"\n{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
