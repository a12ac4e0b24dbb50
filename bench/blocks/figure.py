"""The figure of the counts: `python -m bench.blocks.figure` draws it again from the results."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dancegrpo_fast.drawing import write

COLOURS = {
    "eager": "#9aa5b1",
    "compile": "#5b7fa6",
    "patched, none": "#f0bd93",
    "patched, gelu": "#e8935a",
    "patched, all": "#c9521c",
}
BAR = 0.17


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Saved bytes and traffic of each block, all parameters trained; a backward is the paler end of its bar."""
    write(out.parent, {out.stem: partial(_bars, rows)}, [out.suffix[1:]])


def _bars(rows: list[dict[str, Any]]) -> Figure:
    rows = [r for r in rows if r["parameters"] == "trained"]
    blocks = list(dict.fromkeys((r["model"], r["block"]) for r in rows))
    figure = Figure(figsize=(11, 0.8 * len(blocks) + 1.3))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.45))
    longest = [0.0, 0.0]
    for r in rows:
        place = list(COLOURS).index(r["contender"])
        y = blocks.index((r["model"], r["block"])) + BAR * (place - (len(COLOURS) - 1) / 2)
        colour = COLOURS[r["contender"]]
        forward, backward, saved = r["traffic_forward_U"], r["traffic_backward_U"], r["saved_U"]
        left.barh(y, saved, 0.9 * BAR, color=colour)
        right.barh(y, forward, 0.9 * BAR, color=colour)
        right.barh(y, backward, 0.9 * BAR, left=forward, color=colour, alpha=0.5)
        longest = [max(longest[0], saved), max(longest[1], forward + backward)]
        for panel, end, text in (
            (left, saved, f"{saved:.1f}"),
            (right, forward + backward, f"{forward:.0f} + {backward:.0f}"),
        ):
            panel.annotate(text, (end, y), (3, 0), textcoords="offset points", va="center", fontsize=6.5)
    left.set_yticks(range(len(blocks)), [f"{model}\n{block}" for model, block in blocks], fontsize=9)
    left.set_ylim(len(blocks) - 0.45, -0.55)
    for panel, width, label in (
        (left, 1.1 * longest[0], "saved for the backward, U"),
        (right, 1.13 * longest[1], "elementwise traffic, forward + backward (paler), U"),
    ):
        panel.set_xlim(0, width)
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
        panel.tick_params(axis="y", length=0)
        for i in range(1, len(blocks)):
            panel.axhline(i - 0.5, color="#00000018", linewidth=0.8)
    names = {"compile": "torch.compile", **{n: f"ours, recompute {n[9:]}" for n in COLOURS if n.startswith("patched")}}
    figure.legend(
        handles=[Patch(color=colour, label=names.get(name, name)) for name, colour in COLOURS.items()],
        loc="outside upper center",
        ncols=len(COLOURS),
    )
    where = rows[0]["environment"]
    figure.supxlabel(
        "Counted on fake tensors, not measured. U: one bfloat16 row of the model's width per token."
        f" torch {where['torch']}, diffusers {where['diffusers']}",
        fontsize=8,
    )
    return figure


if __name__ == "__main__":
    source = Path(__file__).parents[1] / "results" / "blocks-traffic.jsonl"
    draw([json.loads(line) for line in source.read_text().splitlines()], source.with_suffix(".png"))
