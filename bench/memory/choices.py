"""What `auto` chooses: each scenario through the command line, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..rows import Row, grid, made_with
from .scenarios import SCENARIOS, Scenario

GIB = 2**30
ADVICE = 4


def row(scenario: Scenario, where: Row) -> Row:
    """The plan, and what planning took. A plan that cannot be made has `error`: why."""
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder) / "plan.json", Path(folder) / "errors"
        command = [sys.executable, "-m", "dancegrpo_fast.cli", "memory", *scenario.command.split(), "--json", str(file)]
        begin = time.monotonic()
        with errors.open("w") as stream:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream)
            # Unlike `wait`, it tells of this process alone.
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        found: Row = {
            "op": "plan",
            "name": scenario.name,
            "command": f"dancegrpo-fast memory {scenario.command}",
            "exit_status": process.returncode,
            "wall_seconds": round(seconds, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            # Linux counts in KiB.
            "peak_rss_bytes": usage.ru_maxrss * 1024,
        }
        if not file.exists():
            return found | {"error": errors.read_text().strip().splitlines()[-1], "environment": where}
        plan = json.loads(file.read_text())
    for phase in plan["phases"]:
        del phase["timeline"]
    kept = ("settings", "policy", "phases", "peak", "margins", "saved_by_group", "reasons", "advice", "answer", "cards")
    found |= {name: plan[name] for name in kept}
    return found | {"environment": where}


def rows(where: Row, only: str = "") -> list[Row]:
    """Of every scenario whose name contains `only`."""
    found = []
    for scenario in SCENARIOS:
        if only in scenario.name:
            found.append(row(scenario, where))
            print(f"{scenario.name}: {found[-1]['wall_seconds']:.0f} s", flush=True)
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _capacity(found: Row) -> float:
    return float(found["settings"]["gpu_gib"])


def verdict(found: Row) -> str:
    """Whether it fits, or what is missing."""
    if "error" in found:
        return "no plan"
    mine = next(card for card in found["cards"] if card["gib"] == _capacity(found))
    spare = mine["spare_bytes"] / GIB
    said = {"yes": f"fits, {spare:.1f} GiB to spare", "no": f"{-spare:.1f} GiB are missing"}
    return said.get(mine["state"], str(mine["state"]))


def summary(found: list[Row]) -> list[str]:
    """One line a scenario."""
    rows: list[list[str]] = []
    for each in found:
        if "error" in each:
            rows.append([each["name"], "", "", "", "no plan", "", each["error"]])
            continue
        peak, of = each["peak"], f"{_capacity(each):g}"
        sizes = [_gib(peak["bytes"]), _gib(peak["total_bytes"]), of]
        rows.append([each["name"], *sizes, verdict(each), peak["phase"], each["policy"]])
    return grid(["", "exact, GiB", "with margins", "of", "", "peak in", "policy that `auto` chose"], rows)


def details(each: Row) -> list[str]:
    """One scenario: phases, reasons, advice, and what planning took."""
    lines = ["", f"## {each['name']}", "", f"    {each['command']}", ""]
    took = (
        f"Planned in {each['wall_seconds']:.0f} s ({each['cpu_seconds']:.0f} s of a core) and"
        f" {each['peak_rss_bytes'] / GIB:.2f} GiB of memory."
    )
    if "error" in each:
        return [*lines, f"No plan: {each['error']}", "", took]
    margins = sum(each["margins"].values())
    names = list(dict.fromkeys(name for phase in each["phases"] for name in phase["budget"]))
    rows = []
    for phase in each["phases"]:
        cells = [_gib(phase["budget"].get(name, 0)) if phase["budget"].get(name) else "" for name in names]
        totals = [_gib(phase["bytes"]), _gib(phase["bytes"] + margins), f"{phase['seconds']:.1f}"]
        rows.append([phase["name"], *cells, *totals])
    lines += grid(["GiB", *names, "exact", "with margins", "assumed seconds"], rows)
    top = max(each["phases"], key=lambda phase: phase["bytes"])
    where = f"{top['op']} in {top['module']}" if top["module"] else top["op"]
    lines += [
        "",
        f"**{each['answer']}** Peak: {top['name']}, {where}. Policy: {each['policy']}.",
    ]
    lines += ["Margins (guesses): " + ", ".join(f"{k} {v / GIB:.2f}" for k, v in each["margins"].items()) + "."]
    lines += ["", *(f"- {reason}" for reason in each["reasons"])]
    if each["advice"]:
        lines += ["", "One change at a time (peak; iteration):", ""]
        lines += [f"- {a['gib']:+.2f} GiB, {100 * a['seconds']:+.1f} %: {a['text']}" for a in each["advice"][:ADVICE]]
    return [*lines, "", took]


def markdown(found: list[Row]) -> str:
    """All scenarios."""
    head = [
        "# What `--checkpointing auto` chooses",
        "",
        "Made by `python -m bench.memory --only scenarios`; predicted, on no GPU. GiB = 2^30. Exact: bytes of",
        "tensors; with margins: and guesses for context, workspaces and fragmentation, the same in every phase.",
        "Seconds are counted work over assumed rates. bfloat16, batch 1, 12 samples a prompt and 16 steps where the",
        "command says nothing else.",
        made_with(found[0]),
        "",
    ]
    return "\n".join([*head, *summary(found), *(line for each in found for line in details(each))]) + "\n"
