"""Counts every block for every contender, writes one JSON line each, prints a table and draws the figure."""

import argparse
from typing import Any
from unittest import mock

from torch._subclasses.fake_tensor import FakeTensorMode

from bench.environment import environment
from bench.repository import RESULTS
from bench.rows import Row, write
from dancegrpo_fast.patch import _layers

from . import figure
from .compiled import count_compiled
from .configurations import CONFIGURATIONS, Configuration
from .count import Counts, Tally, count

# Of the LoRA layers on all linear layers of a block but its modulation.
RANK, LORA_MODELS = 32, ("HunyuanVideo", "FLUX.1-dev")
# With LoRA: arguments of `count`, None for torch.compile; and whether peft's layers run as they are.
WITH_LORA: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "eager": ({}, True),
    "compile": (None, True),
    "lossless, peft's layers": ({"recompute": "gelu", "mode": "lossless"}, True),
    "lossless, gelu": ({"recompute": "gelu", "mode": "lossless"}, False),
    "lossless, all": ({"recompute": "all", "mode": "lossless"}, False),
    "fast, peft's layers": ({"recompute": "gelu"}, True),
    "fast, gelu": ({"recompute": "gelu"}, False),
    "fast, all": ({"recompute": "all"}, False),
}
LORA_NOTES = f"""\
as above, with float32 LoRA layers of rank {RANK} and scale 2 on frozen weights
products: bytes that matrix products read and write, those of the frozen weights among them
peft's layers: in patched blocks, called as peft has them"""
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
  torch (FLUX, Wan) is dgf_memory.rms_norm, and sums for gradients of biases that no op of ours leaves are aten.sum
saved: for the backward; frozen: nothing but the tokens needs gradients (LoRA layers would keep their inputs besides)
launches: operators; for compile kernels, of Inductor's fusions for an H100 that was described to it, none was run
patched: mode "fast", by what the backward computes again; "lossless" takes GELU's gradients by three kernels of torch,
  8 U more in a trained block with recompute gelu or all, and leaves the sums for biases to torch"""


def counted(configuration: Configuration, contender: str, frozen: bool) -> Counts:
    """One row's numbers."""
    with FakeTensorMode():
        if contender == "compile":
            return count_compiled(configuration, frozen)
        return count(configuration, CONTENDERS[contender], frozen)


def counted_with_lora(configuration: Configuration, contender: str) -> Counts:
    """One row's numbers."""
    arguments, as_peft = WITH_LORA[contender]
    with FakeTensorMode(), mock.patch.object(_layers, "_is_known", lambda forward: not as_peft):
        if arguments is None:
            return count_compiled(configuration, lora=RANK)
        return count(configuration, **arguments, lora=RANK)


def _operators(tally: Tally, unit: int) -> dict[str, float]:
    return {name: round(moved / unit, 2) for name, moved in tally.traffic.most_common() if moved >= unit / 200}


def row(configuration: Configuration, contender: str, frozen: bool, where: dict[str, Any]) -> dict[str, Any]:
    """One line of the results."""
    return _row(
        configuration, contender, "frozen" if frozen else "trained", counted(configuration, contender, frozen), where
    )


def lora_row(configuration: Configuration, contender: str, where: dict[str, Any]) -> dict[str, Any]:
    """One line of the results with LoRA."""
    counts, unit = counted_with_lora(configuration, contender), configuration.unit
    products = {
        f"products_{way}_U": round(tally.products / unit, 3)
        for way, tally in (("forward", counts.forward), ("backward", counts.backward))
    }
    return _row(configuration, contender, "LoRA", counts, where) | {"rank": RANK} | products


def _row(
    configuration: Configuration, contender: str, parameters: str, counts: Counts, where: dict[str, Any]
) -> dict[str, Any]:
    unit = configuration.unit
    return {
        "op": "block",
        "model": configuration.model,
        "block": configuration.block,
        "tokens": configuration.tokens,
        "channels": configuration.sizes.channels,
        "contender": contender,
        "parameters": parameters,
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


def lora_table(rows: list[dict[str, Any]]) -> str:
    """Counts of each block with LoRA."""
    head = f"{'block with LoRA':22}{'contender':25}{'forward':>8}{'backward':>9}{'saved':>7}"
    head += f"{'launches':>12}{'products':>15}"
    lines, before = [head, ""], None
    for r in rows:
        label = f"{r['model']} {r['block']}"
        lines.append(
            f"{label if label != before else '':22}{r['contender']:25}{r['traffic_forward_U']:8.1f}"
            f"{r['traffic_backward_U']:9.1f}{r['saved_U']:7.1f}{r['launches_forward']:>6} +{r['launches_backward']:>4}"
            f"{r['products_forward_U']:8.1f} +{r['products_backward_U']:5.1f}"
        )
        before = label
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.blocks", description=__doc__)
    parser.add_argument("--only", default="", help="only blocks whose name contains this; prints the table alone")
    parser.add_argument("--lora", action="store_true", help="only blocks with LoRA layers, and their results")
    options = parser.parse_args()
    where = environment()
    rows: list[Row] = []
    adapted: list[Row] = []
    for configuration in CONFIGURATIONS:
        if options.only not in f"{configuration.model} {configuration.block}":
            continue
        if configuration.model in LORA_MODELS:
            adapted += [lora_row(configuration, contender, where) for contender in WITH_LORA]
        if options.lora:
            continue
        for contender in CONTENDERS:
            rows += [row(configuration, contender, frozen, where) for frozen in (False, True)]
        print(f"{configuration.model} {configuration.block}: done", flush=True)
    if rows:
        print(table(rows), NOTES, sep="\n\n", end="\n\n")
    if adapted:
        print(lora_table(adapted), LORA_NOTES, sep="\n\n")
    if options.only:
        return
    write(RESULTS / "blocks-lora.jsonl", adapted)
    if options.lora:
        return
    out = RESULTS / "blocks-traffic.jsonl"
    write(out, rows)
    figure.draw(rows, out.with_suffix(".png"))
    print(f"\n{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
