"""Rows of a case, and the table printed at the end."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cases import Call, Case, Inputs
from .harness import Timing
from .rows import Row


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that every operator reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.total += sum(t.nbytes for t in tensors)
        return out


def eager_bytes(call: Call) -> int:
    """Bytes that the operators of one eager call read and write."""
    traffic = _Traffic()
    with traffic:
        call(0)
    return traffic.total


def case_rows(
    case: Case,
    inputs: Inputs,
    timings: dict[str, Timing],
    moved: int,
    copy_bytes: int,
    wrong: set[str],
    environment: Row,
) -> list[Row]:
    """One row per contender. `timings` also holds the copy's; `moved` is what eager moves."""
    copy_rate = copy_bytes / timings["copy"].median / 1e6
    rows = []
    for name, timing in timings.items():
        if name == "copy":
            continue
        least = case.bytes_minimum(denoised="x0 too" in name)
        # Our noise from torch is written by torch and read by the kernel; Inductor's traffic is not known.
        ours = least + (8 * case.batch * case.elements if "torch noise" in name else 0)
        rate = least / timing.median / 1e6
        rows.append(
            {
                "op": case.op,
                "backend": name,
                "batch": case.batch,
                "elements": case.elements,
                "latents_dtype": "float32",
                "output_dtype": str(case.output_dtype).removeprefix("torch."),
                "within_budget": name not in wrong,
                "ms_median": timing.median,
                "ms_min": timing.low,
                "ms_max": timing.high,
                **({} if timing.host is None else {"host_us_median": 1e3 * timing.host}),
                "rounds": timing.rounds,
                "calls_per_round": timing.calls,
                "input_sets": inputs.sets,
                "bytes_minimum": least,
                "bytes_moved": {"eager": moved, "compile": None}.get(name, ours),
                "gb_per_s": rate,
                "copy_gb_per_s": copy_rate,
                "copy_share": rate / copy_rate,
                "times_eager": timings["eager"].median / timing.median,
                "times_compile": timings["compile"].median / timing.median,
                "environment": environment,
            }
        )
    return rows


def host_rows(timings: dict[str, Timing], environment: Row) -> list[Row]:
    """One row per public function."""
    return [
        {
            "op": "host",
            "backend": name,
            "us_median": 1e3 * t.median,
            "us_min": 1e3 * t.low,
            "us_max": 1e3 * t.high,
            "rounds": t.rounds,
            "calls_per_round": t.calls,
            "environment": environment,
        }
        for name, t in timings.items()
    ]


def table(rows: Iterable[Row]) -> str:
    """What a reader wants at a glance; what is slower than torch, or further off than the budget, is marked."""
    head = f"{'op':17}{'shape':>13} {'v':5}{'backend':18}{'ms':>10}{'min':>10}{'max':>10}{'GB/s':>8}{'copy':>7}"
    lines = [head + f"{'x eager':>10}{'x compile':>11}"]
    for r in rows:
        if r["op"] == "launches":
            counts = f"{r['kernels']} kernels, {r['memory_operations']} copies or fills"
            lines.append(f"{'launches':17}{'1 x 64':>13} {'fp32':5}{r['backend']:40}{counts}{', waits' * r['waits']}")
            continue
        if r["op"] == "host":
            lines.append(f"{'host':17}{'1 x 64':>13} {'fp32':5}{r['backend']:40}{r['us_median']:8.1f} us")
            continue
        v = {"float32": "fp32", "bfloat16": "bf16"}[r["output_dtype"]]
        mark = "" if r["within_budget"] else "  off budget"
        if r["backend"].startswith("ours") and min(r["times_eager"], r["times_compile"]) < 1:
            mark += "  slower"
        if "host_us_median" in r:
            mark = f"{r['host_us_median']:9.1f} us of the host{mark}"
        lines.append(
            f"{r['op']:17}{r['batch']:>3} x {r['elements']:>7} {v:5}{r['backend']:18}{r['ms_median']:10.3f}"
            f"{r['ms_min']:10.3f}{r['ms_max']:10.3f}{r['gb_per_s']:8.2f}{r['copy_share']:7.0%}"
            f"{r['times_eager']:10.2f}{r['times_compile']:11.2f}{mark}"
        )
    return "\n".join(lines)
