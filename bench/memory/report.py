"""The measured table as text: the worst deviations of each family, every row, and what lies further off."""

from typing import Any

from ..rows import Row, grid, made_with
from .table import AUTO, FIRST

# The share that a prediction may be off without an explanation.
WITHIN = 0.02
UNET = "SD UNet"
LABELS = ("family", "dtype", "trained", "block ops", "policy")
# What is compared: title, and the key of the deviation.
COMPARED = {
    "traced: peak": "peak_off",
    "traced: saved": "saved_off",
    "planner: peak": "planned_off",
    "planner: saved": "planned_saved_off",
    "allocator: peak": "allocator_off",
}


def worst(rows: list[Row], key: str) -> float | None:
    """The deviation furthest from 0 among rows that have one."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return max(known, key=abs) if known else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f} %" if value else "0"


def worst_line(rows: list[Row]) -> str:
    """For the console."""
    found = {key: worst(rows, key) for key in COMPARED.values()}
    return ", ".join(f"{key} {_percent(value)}" for key, value in found.items())


def reason(row: Row, key: str) -> str:
    """What can be read off a row that lies further off than `WITHIN`."""
    if key == "allocator_off":
        within = row["measured_allocator_op"].replace("autograd::engine::evaluate_function: ", "")
        return f"within {within.partition(' > autograd')[0]} torch's CPU allocator has more than the live tensors"
    if key == "planned_off" and row["offload"] and row["family"] == UNET:
        return "the planner leaves the block inputs of a UNet on the device"
    if key == "planned_off" and row["offload"]:
        return "the planner counts the inputs of two blocks, as a GPU fetches the next one's; a CPU fetches none ahead"
    if key == "peak_off" and row["patch"] != "off":
        return "block ops see the recorder's module hooks and run their feed-forward in other steps than without"
    if key == "planned_off" and abs(row["peak_off"]) > WITHIN / 2:
        return "as the traced model it is composed of"
    if key == "planned_saved_off" and row["policy"] in (AUTO, f"first {FIRST}") and row[key] > 0:
        return "each block counts as one in the middle; a last one that is kept whole hands no text on and keeps less"
    return (
        "composed of models with fewer blocks; the whole model, traced, does not deviate"
        if "planned" in key
        else "unknown"
    )


def beyond(rows: list[Row]) -> list[tuple[Row, str, float]]:
    """Deviations of more than `WITHIN`: row, key, value."""
    return [
        (row, key, row[key])
        for row in rows
        for key in COMPARED.values()
        if row.get(key) is not None and abs(row[key]) > WITHIN
    ]


def _label(row: Row) -> str:
    return " | ".join(map(str, _names(row)))


def _names(row: Row) -> list[Any]:
    return [row[key] for key in ("family", "dtype", "trained", "patch", "policy")]


def choices(rows: list[Row]) -> list[str]:
    """What `auto` chose, what it was given, and what that took."""
    lines = [
        "",
        "## What `auto` chose",
        "",
        "Given halfway from the planner's peak under full checkpointing to that under none, with the CPU's attention.",
        "In float32 the choice for bfloat16 is applied. Without what waits in host memory, MiB.",
        "",
    ]
    cells = []
    for row in (row for row in rows if row["policy"] == AUTO and row["limit"]):
        share = f"{100 * row['measured_device_peak'] / row['limit']:.1f} %"
        sizes = (row["limit"], row.get("planned_peak"), row["measured_device_peak"])
        cells.append([row["family"], row["dtype"], row["trained"], row["chosen"], *map(_mib, sizes), share])
    head = ["family", "dtype", "trained", "policy", "given", "planner", "ledger", "of what was given"]
    return [*lines, *grid(head, cells)]


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.3f}"


def markdown(rows: list[Row]) -> str:
    """All of it."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    off = beyond(rows)
    lines = [
        "# Memory: predicted and measured",
        "",
        "Made by `python -m bench.memory --only table` on a CPU with small real diffusers models; what is compared is",
        f"told in `bench/memory/__init__.py`. {made_with(rows[0])}",
        "Deviations: predicted over measured, less 1.",
        "Peaks are of all that lives, weights and gradients included; `fixed` is their part.",
        "",
        "float32 and bfloat16, all weights and LoRA: every policy, and what `auto` takes. Left out, as they would",
        "repeat what other rows show: rollouts of LoRA without block ops, autocast with LoRA and with policies that",
        "keep the results of single operators, and block ops under these. float32 has no planner column: the planner",
        "knows float32 weights under autocast only.",
        "",
        "## Worst deviation of each family",
        "",
        "Against the ledger of live storages; the last two columns against torch's allocator.",
        "",
    ]
    worsts = []
    for family in families:
        mine = [row for row in rows if row["family"] == family]
        plain = [row for row in mine if row["dtype"] == "float32"]
        others = [row for row in mine if row["dtype"] != "float32"]
        keys = ("peak_off", "activations_off", "saved_off", "planned_off", "planned_saved_off")
        cells = [_percent(worst(mine, key)) for key in keys]
        cells += [_percent(worst(part, "allocator_off")) for part in (plain, others)]
        worsts.append([family, len(mine), *cells])
    head = ["", "rows", "traced: peak", "peak without fixed", "saved", "planner: peak", "saved"]
    lines += grid([*head, "allocator, float32: traced peak", "allocator, bfloat16"], worsts)
    lines += ["", f"## Further off than {100 * WITHIN:g} %: {len(off)} of {_count(rows)} comparisons", ""]
    if off:
        titles = {key: title for title, key in COMPARED.items()}
        further = [[*_names(row), titles[key], _percent(v), reason(row, key)] for row, key, v in off]
        lines += grid([*LABELS, "what", "off", "why"], further)
    if errors := [row for row in rows if "planned_error" in row]:
        lines += ["", "The planner has no plan for:", ""]
        lines += [f"- {_label(row)}: {row['planned_error']}" for row in errors]
    lines += choices(rows)
    lines += ["", "## Every row, MiB", ""]
    columns = ["measured_fixed", "predicted_peak", "planned_peak", "measured_peak", "measured_allocator_peak"]
    columns += ["predicted_saved", "planned_saved", "measured_saved", "measured_allocator_saved"]
    every = []
    for row in rows:
        is_train = row["policy"] != "rollout"
        shown = [row.get(name) if is_train or "saved" not in name else None for name in columns]
        every.append([*_names(row), *map(_mib, shown)])
    by = ["planner", "ledger", "allocator"]
    return "\n".join([*lines, *grid([*LABELS, "fixed", "peak: traced", *by, "saved: traced", *by], every)]) + "\n"


def _count(rows: list[Row]) -> int:
    return sum(row.get(key) is not None for row in rows for key in COMPARED.values())
