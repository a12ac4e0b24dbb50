"""A plan as text and as JSON."""

from typing import Any

from .budget import CAPACITIES, CATEGORIES, Plan
from .settings import GIB


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _head(plan: Plan) -> str:
    s = plan.settings
    size = f"{s.frames} x {s.height} x {s.width}" if s.frames > 1 else f"{s.height} x {s.width}"
    trained = f"LoRA {s.lora}" + ("" if s.base == "none" else f" on {s.base}") if s.lora else "full fine-tuning"
    shared = f", {s.strategy} over {s.fsdp} GPUs" if s.is_sharded else ""
    return f"{s.model}, {size}, {trained}, {s.dtype}{shared}; policy {plan.policy}; {s.gpu_gib:g} GiB"


def table(plan: Plan) -> str:
    """Phases by categories in GiB, the peak, margins, what it fits, reasons and advice."""
    shown = [name for name in CATEGORIES if any(phase.budget.get(name) for phase in plan.phases)]
    rows = [["GiB", *shown, "sum", "seconds"]]
    rows += [
        [phase.name, *(_gib(phase.budget.get(name, 0)) for name in shown), _gib(phase.bytes), f"{phase.seconds:.1f}"]
        for phase in plan.phases
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_head(plan), ""]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    peak = plan.peak
    where = f" in {peak.module}" if peak.module else ""
    lines += ["", f"peak: {_gib(peak.bytes)} GiB exact, in {peak.name}: {peak.op}{where}"]
    margins = ", ".join(f"{name} {_gib(size)}" for name, size in plan.margins.items())
    lines.append(f"margins (guesses): {margins}; with them {_gib(plan.total_bytes)} GiB")
    sizes = sorted({*CAPACITIES, plan.settings.gpu_gib})
    lines.append("fits: " + ", ".join(f"{size:g} GiB {'yes' if plan.fits(size) else 'no'}" for size in sizes))
    if not plan.fits(plan.settings.gpu_gib):
        lines.append(f"missing: {_gib(plan.total_bytes - plan.settings.gpu_gib * GIB)} GiB")
    if plan.saved_by_group:
        ranked = sorted(plan.saved_by_group.items(), key=lambda item: -item[1])
        lines.append(
            "kept for the backward: " + ", ".join(f"{name} {_gib(size)}" for name, size in ranked if size >> 20)
        )
    lines += ["", *(f"- {reason}" for reason in plan.reasons)]
    if plan.advice:
        lines += ["", "one change at a time (peak; iteration):"]
        lines += [f"  {a.gib:+7.2f} GiB  {100 * a.seconds:+6.1f} %  {a.text}" for a in plan.advice]
    rates = ", ".join(f"{name} {value:g}" for name, value in vars(plan.settings.rates).items())
    lines += ["", f"seconds are counted work over assumed rates ({rates}), not timings"]
    return "\n".join(lines)


def as_dict(plan: Plan) -> dict[str, Any]:
    """For JSON; bytes and seconds."""
    return {
        "settings": plan.settings.as_dict(),
        "policy": plan.policy,
        "phases": [
            {
                "name": phase.name,
                "bytes": phase.bytes,
                "budget": phase.budget,
                "seconds": phase.seconds,
                "op": phase.op,
                "module": phase.module,
                "timeline": [[at, budget] for at, budget in phase.timeline],
            }
            for phase in plan.phases
        ],
        "peak": {"phase": plan.peak.name, "bytes": plan.peak_bytes, "total_bytes": plan.total_bytes},
        "margins": plan.margins,
        "fits": {f"{size:g}": plan.fits(size) for size in sorted({*CAPACITIES, plan.settings.gpu_gib})},
        "saved_by_group": plan.saved_by_group,
        "reasons": list(plan.reasons),
        "advice": [vars(advice) for advice in plan.advice],
    }
