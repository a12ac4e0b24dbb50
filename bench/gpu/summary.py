"""What is expected of the kernels, and whether the rows of a run show it."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MET, MISSED = "met   ", "MISSED"
LARGEST = (8, 806_400)
# Share of copy bandwidth, times eager, times compile; and microseconds of the host.
COPY_SHARE, TIMES_EAGER, TIMES_COMPILE, HOST_US = 0.8, 10.0, 1.3, 8.0
STEP = "cuda: transition_step(seed=)"
OP = "cuda: torch.ops.dgf.transition_step"
# Of the block ops at HunyuanVideo's sizes: share of copy bandwidth, times compile.
BLOCK_MODEL, BLOCK_SHARE, BLOCK_COMPILE = "HunyuanVideo", 0.7, 0.9
# Relative deviation of predicted bytes.
MEMORY_OFF = 0.02
BLOCK_FORMS = (
    ("norm_modulate", "3 consumers"),
    ("gated_residual_norm_modulate", "in a block"),
    ("gated_residual", "end of a block"),
    ("qk_norm_rope", "double stream"),
    ("qk_norm_rope", "single stream"),
    ("gelu_tanh", "plain"),
    ("gelu_tanh", "behind attention"),
)


def read(path: Path) -> list[Row]:
    """Rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _line(met: bool, text: str) -> str:
    return f"{MET if met else MISSED} {text}"


def _speed(rows: list[Row]) -> list[str]:
    found = []
    largest = [r for r in rows if (r.get("batch"), r.get("elements")) == LARGEST]
    for row in largest:
        if row["backend"] != "ours, cuda":
            continue
        shape = f"{row['op']} at 8 x 806,400, {row['output_dtype']}:"
        for value, wanted, text in (
            (row["copy_share"], COPY_SHARE, f"{row['copy_share']:.0%} of copy bandwidth, expected {COPY_SHARE:.0%}"),
            (row["times_eager"], TIMES_EAGER, f"{row['times_eager']:.2f} x eager, expected {TIMES_EAGER:g}"),
            (row["times_compile"], TIMES_COMPILE, f"{row['times_compile']:.2f} x compile, expected {TIMES_COMPILE:g}"),
        ):
            found.append(_line(value >= wanted, f"{shape} {text}"))
    return found or [_line(False, "8 x 806,400 was not measured through CUDA")]


def _launches(rows: list[Row]) -> list[str]:
    found = [r for r in rows if r["op"] == "launches" and r["backend"] == STEP]
    if not found:
        return [_line(False, "launches of a step were not counted")]
    row = found[0]
    once = row["kernels"] == 1 and row["memory_operations"] == 0
    return [
        _line(
            once, f"a step starts {row['kernels']} kernels and {row['memory_operations']} copies or fills, expected 1"
        ),
        _line(not row["waits"], f"a step {'waits' if row['waits'] else 'does not wait'} for the device"),
    ]


def _host(rows: list[Row]) -> list[str]:
    cost = {r["backend"]: r["us_median"] for r in rows if r["op"] == "host"}
    found = [
        _line(cost[name] <= HOST_US, f"{name} costs the host {cost[name]:.1f} us, expected at most {HOST_US:g}")
        for name in (STEP, OP)
        if name in cost
    ]
    return found or [_line(False, "the host's cost was not measured through CUDA")]


def transition_lines(rows: list[Row]) -> list[str]:
    """A line per expectation of a step and a loss; one that was not measured is missed."""
    return _launches(rows) + _speed(rows) + _host(rows)


def _block_op(rows: list[Row], op: str, form: str) -> list[str]:
    name = f"{op}, {form}"
    found = [r for r in rows if (r["op"], r.get("form"), r["backend"]) == (op, form, "ours, fast")]
    lines = []
    for row in found:
        shape = f"{name}, {row['pass']}:"
        share, eager, compiled = row["copy_share"], row["times_eager"], row["times_compile"]
        lines += [
            _line(share >= BLOCK_SHARE, f"{shape} {share:.0%} of copy bandwidth, expected {BLOCK_SHARE:.0%}"),
            _line(eager > 1.0, f"{shape} {eager:.2f} x eager, expected more than 1"),
            _line(compiled >= BLOCK_COMPILE, f"{shape} {compiled:.2f} x compile, expected {BLOCK_COMPILE:g}"),
        ]
    return lines or [_line(False, f"{name} was not measured")]


def _block_memory(rows: list[Row]) -> list[str]:
    peaks = {
        r["backend"]: r["peak_bytes"] / 2**30
        for r in rows
        if r["op"] == "blocks" and "backward" in r["pass"] and r["peak_bytes"] is not None
    }
    patched = [name for name in peaks if name.startswith("patched") and not name.endswith("compile")]
    if not patched or not {"eager", "compile"} <= set(peaks):
        return [_line(False, "peak memory of the two blocks was not measured")]
    return [
        _line(
            peaks[name] < min(peaks["eager"], peaks["compile"]),
            f"two blocks, {name}: peak {peaks[name]:.2f} GiB, expected below eager's {peaks['eager']:.2f}"
            f" and compile's {peaks['compile']:.2f}",
        )
        for name in patched
    ]


def block_lines(rows: list[Row]) -> list[str]:
    """A line per expectation of the block ops in "fast" mode and of the blocks, at HunyuanVideo's sizes."""
    mine = [r for r in rows if r.get("model") == BLOCK_MODEL and "pass" in r]
    return [line for op, form in BLOCK_FORMS for line in _block_op(mine, op, form)] + _block_memory(mine)


def memory_lines(rows: list[Row]) -> list[str]:
    """Two lines per training call: whether its peak and what it keeps were predicted."""
    lines = []
    for row in rows:
        if row["op"] != "memory":
            continue
        name = f"{row['model']}, attention {row['attention']}, policy {row['policy']}, block ops {row['patch']}"
        for what in ("peak", "saved"):
            off = row[f"{what}_off"]
            lines.append(
                _line(
                    off is not None and abs(off) <= MEMORY_OFF,
                    f"{name}: {what} predicted {'nothing' if off is None else f'{off:+.1%}'} off,"
                    f" expected at most {MEMORY_OFF:.0%}",
                )
            )
    return lines or [_line(False, "predicted memory was not measured")]
