"""What is expected of the kernels, and whether rows and tests of a run show it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..rows import Row

MET, MISSED = "met   ", "MISSED"
LARGEST = (8, 806_400)
# Share of copy bandwidth, times eager, times compile; and microseconds of the host.
COPY_SHARE, TIMES_EAGER, TIMES_COMPILE, HOST_US = 0.8, 10.0, 1.3, 8.0
STEP = "cuda: transition_step(seed=)"
OP = "cuda: torch.ops.dgf.transition_step"
# Of the block ops at HunyuanVideo's sizes: share of copy bandwidth, times compile, microseconds of the host a forward.
BLOCK_MODEL, BLOCK_SHARE, BLOCK_COMPILE, BLOCK_HOST_US = "HunyuanVideo", 0.7, 0.9, 100.0
FLUX_MODEL = "FLUX.1-dev"
# Relative deviation of predicted bytes, and of the GPU what the allocator may keep beside tensors.
MEMORY_OFF, FRAGMENTATION = 0.02, 0.02
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
KERNELS = {"transition_sample": "a sampling step", "policy_loss": "a loss", "forward_kernel": "a norm"}
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


def _smoke(found: Evidence) -> list[Verdict]:
    verdicts = []
    for name, pattern in SMOKE.items():
        mine = [row for row in found.of("smoke") if re.match(pattern, row["case"])]
        bad = [f"{row['case']}: {row['detail']}" for row in mine if not row["passed"]]
        text = (
            f"{len(mine) - len(bad)} of {len(mine)} first calls by {name} agree" if mine else f"{name} was not called"
        )
        verdicts.append(Verdict(f"smoke-{name}", bool(mine) and not bad, "; ".join([text, *bad])))
    orders = found.of("scalar order")
    known = [f"{row['order']} {row['scalar']}: {row['rounding']}" for row in orders]
    answered = bool(orders) and all(row["rounding"].startswith("the scalar") for row in orders)
    verdicts.append(Verdict("scalar-order", answered, f"scalar times bfloat16: {'; '.join(known) or 'not asked'}"))
    return verdicts


def _speed(found: Evidence) -> list[Verdict]:
    wanted = (
        ("copy-share", "copy_share", COPY_SHARE, "x the copy's bandwidth"),
        ("times-eager", "times_eager", TIMES_EAGER, "x eager"),
        ("times-compile", "times_compile", TIMES_COMPILE, "x compile"),
    )
    largest = [r for r in found.rows if (r.get("batch"), r.get("elements")) == LARGEST and r["backend"] == "ours, cuda"]
    verdicts = [
        Verdict(
            claim,
            row[key] >= least,
            f"{row['op']} at 8 x 806,400, {row['output_dtype']}: {row[key]:.2f} {unit}, expected {least:g}",
        )
        for row in largest
        for claim, key, least, unit in wanted
    ]
    missing = [Verdict(claim, False, f"{claim}: 8 x 806,400 was not measured through CUDA") for claim, *_ in wanted]
    return verdicts or missing


def _launches(found: Evidence) -> list[Verdict]:
    mine = [row for row in found.of("host") if row["backend"] == STEP and "kernels" in row]
    if not mine:
        return [Verdict(c, False, f"{c}: launches of a step were not counted") for c in ("one-launch", "no-waits")]
    kernels, memory, waits = (mine[0][key] for key in ("kernels", "memory_operations", "waits"))
    text = f"a step starts {kernels} kernels and {memory} copies or fills, expected 1"
    return [
        Verdict("one-launch", kernels == 1 and memory == 0, text),
        Verdict("no-waits", not waits, f"a step {'waits' if waits else 'does not wait'} for the device"),
    ]


def _host(found: Evidence) -> list[Verdict]:
    cost = {row["backend"]: row["us_median"] for row in found.of("host")}
    return [
        Verdict("host-us", cost[name] <= HOST_US, f"{name}: {cost[name]:.1f} us of the host, expected {HOST_US:g}")
        for name in (STEP, OP)
        if name in cost
    ] or [Verdict("host-us", False, "the host's cost was not measured through CUDA")]


def _bench(found: Evidence) -> list[Verdict]:
    return _launches(found) + _host(found) + _speed(found)


def _block_op(rows: list[Row], op: str, form: str) -> list[Verdict]:
    name = f"{op}, {form}"
    verdicts = []
    for row in (r for r in rows if (r["op"], r.get("form"), r["backend"]) == (op, form, "ours, fast")):
        shape = f"{name}, {row['pass']}:"
        share, eager, compiled = row["copy_share"], row["times_eager"], row["times_compile"]
        host = row.get("host_us_median")
        verdicts += [
            Verdict("block-copy-share", share >= BLOCK_SHARE, f"{shape} {share:.2f} x copy, expected {BLOCK_SHARE:g}"),
            Verdict("block-times-eager", eager > 1.0, f"{shape} {eager:.2f} x eager, expected more than 1"),
            Verdict(
                "block-times-compile",
                compiled >= BLOCK_COMPILE,
                f"{shape} {compiled:.2f} x compile, expected {BLOCK_COMPILE:g}",
            ),
        ]
        if host is not None and row["pass"] == "forward":
            text = f"{shape} {host:.0f} us of the host, expected {BLOCK_HOST_US:g}"
            verdicts.append(Verdict("block-host-us", host <= BLOCK_HOST_US, text))
    claims = ("block-copy-share", "block-times-eager", "block-times-compile", "block-host-us")
    return verdicts or [Verdict(claim, False, f"{claim}: {name} was not measured") for claim in claims]


def _below(found: Evidence, model: str, key: str, claim: str) -> list[Verdict]:
    """Whether patched blocks take less than eager and compiled ones."""
    gib = {
        row["backend"]: row[key] / 2**30
        for row in found.of("blocks")
        if row["model"] == model and "backward" in row["pass"] and row[key] is not None
    }
    patched = [name for name in gib if name.startswith("patched") and not name.endswith("compile")]
    what = f"{key.partition('_')[0]} of two blocks of {model}"
    if not patched or not {"eager", "compile"} <= set(gib):
        return [Verdict(claim, False, f"{what} was not measured")]
    return [
        Verdict(
            claim,
            gib[name] < min(gib["eager"], gib["compile"]),
            f"{what}, {name}: {gib[name]:.2f} GiB, expected below eager's {gib['eager']:.2f}"
            f" and compile's {gib['compile']:.2f}",
        )
        for name in patched
    ]


def _flux_speed(found: Evidence) -> list[Verdict]:
    rows = [r for r in found.of("blocks") if r["model"] == FLUX_MODEL and r["backend"] == "patched, fast"]
    return [
        Verdict(
            "flux-block-speed",
            row["times_eager"] > 1.0,
            f"two blocks of {FLUX_MODEL}, {row['pass']}: {row['times_eager']:.2f} x eager, expected more than 1"
            f" ({'no' if row['times_compile'] is None else format(row['times_compile'], '.2f')} x compile)",
        )
        for row in rows
    ] or [Verdict("flux-block-speed", False, f"two blocks of {FLUX_MODEL} were not measured")]


def _blocks(found: Evidence) -> list[Verdict]:
    """Of the block ops in "fast" mode at HunyuanVideo's sizes, and of the blocks."""
    mine = [r for r in found.rows if r.get("model") == BLOCK_MODEL and "pass" in r]
    return [
        *(line for op, form in BLOCK_FORMS for line in _block_op(mine, op, form)),
        *_below(found, BLOCK_MODEL, "peak_bytes", "blocks-peak"),
        *_flux_speed(found),
        *_below(found, FLUX_MODEL, "saved_bytes", "flux-block-saved"),
    ]


def _predicted(found: Evidence) -> list[Verdict]:
    verdicts = []
    for row in found.of("memory", "decode memory"):
        decode = row["op"] == "decode memory"
        name = f"decode of {row['model']}, {row['sample']}" if decode else row["case"]
        for claim, key in (
            (("decode-peak", "peak_off"),) if decode else (("memory-peak", "peak_off"), ("memory-saved", "saved_off"))
        ):
            off = row[key]
            found_off = "nothing" if off is None else f"{off:+.1%} off"
            text = f"{name}: {claim} predicted {found_off}, expected {MEMORY_OFF:.0%}"
            verdicts.append(Verdict(claim, off is not None and abs(off) <= MEMORY_OFF, text))
        if row["reserved_bytes"] is not None:
            beside = row["reserved_bytes"] - row["allocated_bytes"]
            text = f"{name}: {beside / 2**30:.2f} GiB reserved beside {row['allocated_bytes'] / 2**30:.2f} allocated"
            verdicts.append(Verdict("reserved", beside <= FRAGMENTATION * row["environment"]["memory_bytes"], text))
    seen = {verdict.claim for verdict in verdicts}
    claims = ("memory-peak", "memory-saved", "decode-peak", "reserved")
    return verdicts + [Verdict(c, False, f"{c} was not measured") for c in claims if c not in seen]


def _memory(found: Evidence) -> list[Verdict]:
    rows = [row for row in found.of("attention memory") if row["masked"] and row["attention"] in MASKED]
    runs = [
        Verdict(
            "masked-attention", row["runs"], f"{row['attention']} with a mask: {row.get('error') or row['kernels']}"
        )
        for row in rows
    ]
    return _predicted(found) + (runs or [Verdict("masked-attention", False, "no attention with a mask was run")])


def _sanitizer(tool: str) -> Callable[[Evidence], list[Verdict]]:
    def judge(found: Evidence) -> list[Verdict]:
        clean = {row["part"]: row["clean"] for row in found.of("sanitizer") if row["tool"] == tool}
        return [
            Verdict(f"{tool}-{part.replace(' ', '-')}", clean.get(part, False), f"{tool}, {part}: {text}")
            for part in PARTS
            for text in ["clean" if clean.get(part) else "not clean" if part in clean else "not checked"]
        ]

    return judge


def _ncu(found: Evidence) -> list[Verdict]:
    shares = {row["kernel"]: row["value"] for row in found.of("ncu") if row["metric"].startswith("dram__throughput")}
    verdicts = []
    for pattern, name in KERNELS.items():
        share = next((value for kernel, value in shares.items() if pattern in kernel), None)
        text = (
            "was not profiled"
            if share is None
            else f"takes {share:.0f} % of the memory's throughput, expected {NCU_SHARE:g}"
        )
        verdicts.append(Verdict("ncu", share is not None and share >= NCU_SHARE, f"{name} {text}"))
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
    "more": _tests("more"),
}


def held(verdicts: Iterable[Verdict]) -> dict[str, bool]:
    """Claim -> whether all that was expected of it is so."""
    found: dict[str, bool] = {}
    for verdict in verdicts:
        found[verdict.claim] = found.get(verdict.claim, True) and verdict.met
    return found
