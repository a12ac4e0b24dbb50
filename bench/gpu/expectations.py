"""What is expected of the kernels, and whether rows and tests of a run show it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..rows import Row

MET, MISSED = "met   ", "MISSED"
LARGEST = (8, 806_400)
# Claim, key, the least that is expected, and of what; and microseconds of the host.
SPEED = (
    ("copy-share", "copy_share", 0.8, "the copy's bandwidth"),
    ("times-eager", "times_eager", 10.0, "eager"),
    ("times-compile", "times_compile", 1.3, "compile"),
)
HOST_US = 8.0
STEP = "cuda: transition_step(seed=)"
OP = "cuda: torch.ops.dgf.transition_step"
# Of the block ops at HunyuanVideo's sizes; of the host a forward; and of two blocks of FLUX.
BLOCK_MODEL, BLOCK_HOST_US = "HunyuanVideo", 100.0
BLOCK_SPEED = (
    ("block-copy-share", "copy_share", 0.7, "copy"),
    ("block-times-eager", "times_eager", 1.0, "eager"),
    ("block-times-compile", "times_compile", 0.9, "compile"),
)
FLUX_MODEL, FLUX_SPEED = "FLUX.1-dev", ("flux-block-speed", "times_eager", 1.0, "eager")
# Of attention without a mask, at two prompts of unequal length, by the faster of torch's own ways.
RAGGED_SPEED = (("ragged-speed", "times_peer", 1.5, "masked"),)
# Relative deviation of predicted bytes, and of the GPU what the allocator may keep beside tensors.
MEMORY_OFF, FRAGMENTATION = 0.02, 0.13
# Share of the memory's throughput in a kernel.
NCU_SHARE = 60.0
BLOCK_FORMS = (
    ("norm_modulate", "3 consumers"),
    ("gated_residual_norm_modulate", "in a block"),
    ("gated_residual", "end of a block"),
    ("qk_norm_rope", "double stream"),
    ("qk_norm_rope", "single stream"),
    ("gelu_tanh", "plain"),
    ("gelu_tanh", "behind attention"),
)
KERNELS = {"sample_kernel": "a sampling step", "policy_loss": "a loss", "forward_kernel": "a norm"}
PARTS = ("cuda", "triton", "block ops")
MASKED = ("_native_efficient", "_native_cudnn")
SMOKE = {"cuda": r"cuda:", "triton": r"triton, ", "block-ops": r"block op, "}


class Verdict(NamedTuple):
    """One expectation: which claim it belongs to, whether it is so, and a line about it."""

    claim: str
    met: bool
    text: str

    def __str__(self) -> str:
        return f"{MET if self.met else MISSED} {self.text}"


@dataclass(frozen=True)
class Evidence:
    """Of a run: rows of its results file, lines of its tests, and the claims of `gpu-jobs.json`."""

    rows: list[Row]
    tests: list[Row]
    jobs: list[dict[str, Any]]

    def of(self, *ops: str) -> list[Row]:
        """Rows of some ops."""
        return [row for row in self.rows if row["op"] in ops]


def _ratios(row: Row, label: str, wanted: Iterable[tuple[str, str, float, str]]) -> list[Verdict]:
    """Claim, key, the least that is expected of it, and what it is a multiple of."""
    return [
        Verdict(claim, row[key] >= least, f"{label}: {row[key]:.2f} x {unit}, expected {least:g}")
        for claim, key, least, unit in wanted
    ]


def _none(claims: Iterable[str], text: str) -> list[Verdict]:
    """Nothing was measured, so that nothing holds."""
    return [Verdict(claim, False, f"{claim}: {text}") for claim in claims]


def _smoke(found: Evidence) -> list[Verdict]:
    verdicts = []
    for name, pattern in SMOKE.items():
        mine = [row for row in found.of("smoke") if re.match(pattern, row["case"])]
        bad = [f"{row['case']}: {row['detail']}" for row in mine if not row["passed"]]
        said = f"{len(mine) - len(bad)} of {len(mine)} first calls by {name} agree"
        text = "; ".join([said if mine else f"{name} was not called", *bad])
        verdicts.append(Verdict(f"smoke-{name}", bool(mine) and not bad, text))
    orders = found.of("scalar order")
    known = [f"{row['order']} {row['scalar']}: {row['rounding']}" for row in orders]
    answered = bool(orders) and all(row["rounding"].startswith("the scalar") for row in orders)
    return [
        *verdicts,
        Verdict("scalar-order", answered, f"scalar times bfloat16: {'; '.join(known) or 'not asked'}"),
    ]


def _bench(found: Evidence) -> list[Verdict]:
    host = {row["backend"]: row for row in found.of("host")}
    verdicts = _none(("one-launch", "no-waits"), "launches of a step were not counted")
    if "kernels" in host.get(STEP, {}):
        kernels, memory, waits = (host[STEP][key] for key in ("kernels", "memory_operations", "waits"))
        text = f"a step starts {kernels} kernels and {memory} copies or fills, expected 1"
        verdicts = [Verdict("one-launch", kernels == 1 and memory == 0, text)]
        verdicts += [Verdict("no-waits", not waits, f"a step {'waits' if waits else 'does not wait'} for the device")]
    cost = {name: host[name]["us_median"] for name in (STEP, OP) if name in host}
    verdicts += [
        Verdict("host-us", us <= HOST_US, f"{name}: {us:.1f} us of the host, expected {HOST_US:g}")
        for name, us in cost.items()
    ] or _none(["host-us"], "it was not measured through CUDA")
    largest = [r for r in found.rows if (r.get("batch"), r.get("elements")) == LARGEST and r["backend"] == "ours, cuda"]
    speed = [v for r in largest for v in _ratios(r, f"{r['op']} at 8 x 806,400, {r['output_dtype']}", SPEED)]
    return verdicts + (speed or _none((each[0] for each in SPEED), "8 x 806,400 was not measured through CUDA"))


def _block_op(rows: list[Row], op: str, form: str) -> list[Verdict]:
    verdicts = []
    for row in (r for r in rows if (r["op"], r.get("form"), r["backend"]) == (op, form, "ours, fast")):
        shape, host = f"{op}, {form}, {row['pass']}", row.get("host_us_median")
        verdicts += _ratios(row, shape, BLOCK_SPEED)
        if host is not None and row["pass"] == "forward":
            text = f"{shape}: {host:.0f} us of the host, expected {BLOCK_HOST_US:g}"
            verdicts.append(Verdict("block-host-us", host <= BLOCK_HOST_US, text))
    claims = [*(each[0] for each in BLOCK_SPEED), "block-host-us"]
    return verdicts or _none(claims, f"{op}, {form} was not measured")


def _below(found: Evidence, model: str, key: str, claim: str) -> list[Verdict]:
    """Whether patched blocks take less than eager and compiled ones."""
    mine = [r for r in found.of("blocks") if r["model"] == model and "backward" in r["pass"] and r[key] is not None]
    gib = {row["backend"]: row[key] / 2**30 for row in mine}
    patched = [name for name in gib if name.startswith("patched") and not name.endswith("compile")]
    what = f"{key.partition('_')[0]} of two blocks of {model}"
    if not patched or not {"eager", "compile"} <= set(gib):
        return _none([claim], f"{what} was not measured")
    others = f"expected below eager's {gib['eager']:.2f} and compile's {gib['compile']:.2f}"
    least = min(gib["eager"], gib["compile"])
    return [Verdict(claim, gib[n] < least, f"{what}, {n}: {gib[n]:.2f} GiB, {others}") for n in patched]


def _blocks(found: Evidence) -> list[Verdict]:
    """Of the block ops in "fast" mode at HunyuanVideo's sizes, and of the blocks."""
    mine = [r for r in found.rows if r.get("model") == BLOCK_MODEL and "pass" in r]
    flux = [r for r in found.of("blocks") if r["model"] == FLUX_MODEL and r["backend"] == "patched, fast"]
    what = f"two blocks of {FLUX_MODEL}"
    speed = [v for r in flux for v in _ratios(r, f"{what}, {r['pass']}", (FLUX_SPEED,))]
    return [
        *(line for op, form in BLOCK_FORMS for line in _block_op(mine, op, form)),
        *_below(found, BLOCK_MODEL, "peak_bytes", "blocks-peak"),
        *(speed or _none([FLUX_SPEED[0]], f"{what} were not measured")),
        *_below(found, FLUX_MODEL, "saved_bytes", "flux-block-saved"),
    ]


def _ragged(found: Evidence) -> list[Verdict]:
    """Of one attention, forward and with its backward."""
    mine = [row for row in found.of("ragged") if row["backend"] in ("ours, native", "ours, _native_flash")]
    verdicts = []
    for way in sorted({row["pass"] for row in mine}):
        best = max((row for row in mine if row["pass"] == way), key=lambda row: float(row["times_peer"]))
        verdicts += _ratios(best, f"attention of unequal prompts, {best['backend']}, {way}", RAGGED_SPEED)
    for row in mine:
        text = f"{row['backend']}, {row['pass']}: {'within' if row['within_budget'] else 'off'} its budget"
        verdicts.append(Verdict("ragged-values", row["within_budget"], text))
    return verdicts or _none(("ragged-speed", "ragged-values"), "it was not measured")


def _memory(found: Evidence) -> list[Verdict]:
    verdicts = []
    for row in found.of("memory", "decode memory"):
        decode = row["op"] == "decode memory"
        keys = (
            (("decode-peak", "peak_off"),) if decode else (("memory-peak", "peak_off"), ("memory-saved", "saved_off"))
        )
        for claim, key in keys:
            off = row[key]
            said = "nothing" if off is None else f"{off:+.1%} off"
            text = f"{row['case']}: {claim} predicted {said}, expected {MEMORY_OFF:.0%}"
            verdicts.append(Verdict(claim, off is not None and abs(off) <= MEMORY_OFF, text))
        if row["reserved_bytes"] is not None:
            beside, allocated = row["reserved_bytes"] - row["allocated_bytes"], row["allocated_bytes"]
            text = f"{row['case']}: {beside / 2**30:.2f} GiB reserved beside {allocated / 2**30:.2f} allocated"
            verdicts.append(Verdict("reserved", beside <= FRAGMENTATION * allocated, text))
    for row in (row for row in found.of("attention memory") if row["masked"] and row["attention"] in MASKED):
        text = f"{row['attention']} with a mask: {row.get('error') or row['kernels']}"
        verdicts.append(Verdict("masked-attention", row["runs"], text))
    claims = ("memory-peak", "memory-saved", "decode-peak", "reserved", "masked-attention")
    seen = {verdict.claim for verdict in verdicts}
    return verdicts + _none([claim for claim in claims if claim not in seen], "it was not measured")


def _sanitizer(tool: str) -> Callable[[Evidence], list[Verdict]]:
    def judge(found: Evidence) -> list[Verdict]:
        clean = {row["part"]: row["clean"] for row in found.of("sanitizer") if row["tool"] == tool}
        said = {True: "clean", False: "not clean", None: "not checked"}
        return [
            Verdict(
                f"{tool}-{part.replace(' ', '-')}", bool(clean.get(part)), f"{tool}, {part}: {said[clean.get(part)]}"
            )
            for part in PARTS
        ]

    return judge


def _ncu(found: Evidence) -> list[Verdict]:
    shares = {row["kernel"]: row["value"] for row in found.of("ncu") if row["metric"].startswith("dram__throughput")}
    verdicts = []
    for pattern, name in KERNELS.items():
        share = next((value for kernel, value in shares.items() if pattern in kernel), -1.0)
        text = f"takes {share:.0f} % of the memory's throughput, expected {NCU_SHARE:g}"
        verdicts.append(Verdict("ncu", share >= NCU_SHARE, f"{name} {text if share >= 0 else 'was not profiled'}"))
    return verdicts


def _tests(stage: str) -> Callable[[Evidence], list[Verdict]]:
    """The claims of `gpu-jobs.json` that tests judge, by the names of these."""

    def judge(found: Evidence) -> list[Verdict]:
        verdicts = []
        for job in found.jobs:
            if job["stage"] != stage or "tests" not in job:
                continue
            mine = [line for line in found.tests if re.search(job["tests"], line["test"])]
            outcomes = [line["outcome"] for line in mine]
            bad = [line["test"] for line in mine if line["outcome"] == "failed"]
            counted = ", ".join(f"{outcomes.count(each)} {each}" for each in ("passed", "failed", "skipped"))
            text = f"{job['id']}: {counted}"
            met = not bad and "passed" in outcomes
            verdicts.append(
                Verdict(job["id"], met, "; ".join([text, *bad[:3]]) if mine else f"{job['id']}: no test ran")
            )
        return verdicts

    return judge


JUDGES: dict[str, Callable[[Evidence], list[Verdict]]] = {
    "smoke": _smoke,
    "tests": _tests("tests"),
    "bench": _bench,
    "blocks": _blocks,
    "memory": _memory,
    "memcheck": _sanitizer("memcheck"),
    "racecheck": _sanitizer("racecheck"),
    "ncu": _ncu,
    "ragged": _ragged,
    "more": _tests("more"),
}


def held(verdicts: Iterable[Verdict]) -> dict[str, bool]:
    """Claim -> whether all that was expected of it is so."""
    found: dict[str, bool] = {}
    for verdict in verdicts:
        found[verdict.claim] = found.get(verdict.claim, True) and verdict.met
    return found
