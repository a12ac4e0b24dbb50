"""What the gate says of a run's rows and tests, which claims they hold, and what the repository's lists get."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as program
from bench.gpu import expectations, ledger, reports, stages
from bench.gpu.expectations import JUDGES, Evidence, Verdict, held
from bench.gpu.gate import PASSED, Gate, Summary
from bench.gpu.process import Runner
from dancegrpo_fast.memory.planning import margins

from ..tolerances import PREDICTED_BYTES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
JOBS = ledger.jobs_of(ROOT)
GIB = 1 << 30


def judge(stage: str, rows: list[dict[str, Any]], tests: list[dict[str, Any]] | None = None) -> list[Verdict]:
    return JUDGES[stage](Evidence(rows, tests or [], JOBS))


def missed(stage: str, rows: list[dict[str, Any]]) -> list[str]:
    return [str(verdict) for verdict in judge(stage, rows) if not verdict.met]


def speed(op: str, backend: str = "ours, cuda", **numbers: float) -> dict[str, Any]:
    shape = {"batch": 8, "elements": 806_400, "output_dtype": "float32"}
    good = {"copy_share": 0.85, "times_eager": 12.0, "times_compile": 1.4}
    return {"op": op, "backend": backend, **shape, **good, **numbers}


STARTS = {"kernels": 1, "memory_operations": 0, "waits": False}
HOST = [{"op": "host", "backend": name, "us_median": 7.5, **STARTS} for name in (expectations.STEP, expectations.OP)]
BENCH = [*HOST, speed("step"), speed("policy_loss")]


def block_rows() -> list[dict[str, Any]]:
    """A run that meets everything."""
    passes, shared = ("forward", "forward + backward"), {"model": expectations.BLOCK_MODEL, "batch": 1}
    numbers = {"copy_share": 0.75, "times_eager": 2.0, "times_compile": 0.95, "host_us_median": 60.0}
    rows = [
        {"op": op, "form": form, "backend": "ours, fast", "pass": p, **shared, **numbers}
        for op, form in expectations.BLOCK_FORMS
        for p in passes
    ]
    sizes = {"eager": 9, "compile": 7, "patched, lossless": 6, "patched, fast": 5, "patched, fast, compile": 8}
    for model in (expectations.BLOCK_MODEL, expectations.FLUX_MODEL):
        block = {"op": "blocks", "form": "double, single", "model": model, "times_eager": 1.2, "times_compile": 1.0}
        rows += [
            {**block, "backend": name, "pass": p, "peak_bytes": size * GIB, "saved_bytes": size * GIB}
            for name, size in sizes.items()
            for p in passes
        ]
    return rows


MEMORY_ROW = {
    "op": "memory",
    "case": "FLUX",
    "peak_off": 0.0,
    "saved_off": -0.02,
    "allocated_bytes": 10 * GIB,
    "reserved_bytes": 11 * GIB,
    "environment": {"memory_bytes": 140 * GIB},
}
DECODE_ROW = {**MEMORY_ROW, "op": "decode memory", "model": "FLUX", "sample": "1 x 1 x 8 x 8"}
MEMORY = [
    MEMORY_ROW,
    DECODE_ROW,
    *(
        {"op": "attention memory", "attention": name, "masked": True, "runs": True, "kernels": ["one"]}
        for name in expectations.MASKED
    ),
]
RAGGED = [
    {"op": "ragged", "backend": name, "pass": "forward", "times_peer": times, "within_budget": True}
    for name, times in (("ours, native", 2.2), ("ours, _native_flash", 1.4), ("equal", 1.0))
]
SMOKE = [
    *(
        {"op": "smoke", "case": case, "passed": True, "detail": "fine"}
        for case in ("cuda: step", "triton, step: step", "block op, gate: gate")
    ),
    {"op": "scalar order", "order": "scalar * tensor", "scalar": "on the host", "rounding": "the scalar as it is"},
]


@pytest.mark.parametrize(
    ("stage", "good", "place", "change", "said"),
    [
        ("bench", BENCH, 0, {"kernels": 2}, "starts 2 kernels"),
        ("bench", BENCH, 0, {"waits": True}, "a step waits"),
        ("bench", BENCH, 1, {"us_median": 9.0}, "9.0 us"),
        ("bench", BENCH, 2, {"copy_share": 0.79}, "0.79 x the copy"),
        ("bench", BENCH, 2, {"times_compile": 1.2}, "1.20 x compile"),
        ("blocks", block_rows(), 0, {"copy_share": 0.69}, "norm_modulate, 3 consumers, forward: 0.69 x copy"),
        ("blocks", block_rows(), 0, {"times_eager": 0.98}, "0.98 x eager"),
        ("blocks", block_rows(), 0, {"times_compile": 0.89}, "0.89 x compile"),
        ("blocks", block_rows(), 0, {"host_us_median": 150.0}, "150 us of the host"),
        ("memory", MEMORY, 0, {"peak_off": 0.021}, "memory-peak predicted +2.1% off"),
        ("memory", MEMORY, 0, {"saved_off": None}, "memory-saved predicted nothing"),
        ("memory", MEMORY, 0, {"reserved_bytes": 13 * GIB}, "3.00 GiB reserved beside 10.00"),
        ("memory", MEMORY, 1, {"peak_off": -0.5}, "decode-peak predicted -50.0% off"),
        ("memory", MEMORY, 2, {"runs": False, "error": "refused"}, "_native_efficient with a mask: refused"),
        ("ragged", RAGGED, 0, {"times_peer": 1.49}, "ours, native, forward: 1.49 x masked"),
        ("ragged", RAGGED, 1, {"within_budget": False}, "ours, _native_flash, forward: off its budget"),
        ("smoke", SMOKE, 0, {"passed": False, "detail": "3 bits"}, "cuda: step: 3 bits"),
        ("smoke", SMOKE, 3, {"rounding": "neither"}, "neither"),
    ],
)
def test_what_is_expected_of_rows(
    stage: str, good: list[dict[str, Any]], place: int, change: dict[str, Any], said: str
) -> None:
    assert missed(stage, good) == []
    changed = [*good[:place], {**good[place], **change}, *good[place + 1 :]]
    (line,) = missed(stage, changed)
    assert said in line and line.startswith(expectations.MISSED)


def test_less_memory_than_eager_and_compile() -> None:
    """Of HunyuanVideo the peak, of FLUX what is saved; where patched blocks are compiled is no matter."""
    for model, key in ((expectations.BLOCK_MODEL, "peak_bytes"), (expectations.FLUX_MODEL, "saved_bytes")):
        rows = block_rows()
        for row in rows:
            if (row["op"], row["model"], row["backend"]) == ("blocks", model, "patched, fast"):
                row[key] = 8 * GIB
        (line,) = missed("blocks", rows)
        assert f"{model}, patched, fast: 8.00 GiB, expected below eager's 9.00 and compile's 7.00" in line


def test_other_rows_are_expected_of_nothing() -> None:
    others = [*block_rows(), speed("step", "ours, triton", copy_share=0.1), {"op": "self check"}]
    assert judge("bench", [*BENCH, *others]) == judge("bench", BENCH)


def test_margins_are_the_planners() -> None:
    assert margins.FRAGMENTATION[False] == expectations.FRAGMENTATION and expectations.MEMORY_OFF == PREDICTED_BYTES


def line(test: str, outcome: str) -> dict[str, Any]:
    return {"test": test, "outcome": outcome}


def test_claims_of_tests() -> None:
    """All of a claim's tests pass, and one of them at least ran."""
    name = "tests/gpu/test_graphs.py::test_a"
    for outcomes, met in (
        (["passed", "skipped"], True),
        (["passed", "failed"], False),
        (["skipped"], False),
        ([], False),
    ):
        verdicts = judge("tests", [], [line(f"{name}[{i}]", outcome) for i, outcome in enumerate(outcomes)])
        (verdict,) = [v for v in verdicts if v.claim == "cuda-graphs"]
        assert verdict.met is met
    assert "1 passed, 1 failed, 0 skipped; tests/gpu/test_graphs.py::test_a[1]" in str(
        judge("tests", [], [line(f"{name}[0]", "passed"), line(f"{name}[1]", "failed")])
    )


def test_every_expectation_is_a_claim() -> None:
    """In the same stage; nothing that was not measured is met."""
    assert set(JUDGES) == set(stages.EVERY) - {"modules"}
    for stage in JUDGES:
        verdicts = judge(stage, [])
        assert {v.claim for v in verdicts} == {job["id"] for job in JOBS if job["stage"] == stage}
        assert not any(v.met for v in verdicts)
    assert len({job["id"] for job in JOBS}) == len(JOBS)


def test_no_claim_holds_without_a_run() -> None:
    known = ledger.commits((RESULTS / ledger.LEDGER).read_text())
    assert {job["held"] for job in JOBS} <= {ledger.NEVER, *known}


class Collected:
    """A plugin of a pytest within this one, which has imported most of what that one does."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.nodeid for item in session.items]


def test_every_gpu_test_belongs_to_a_claim_of_its_stage() -> None:
    """And what the first call leaves out is what is meant to be: nothing of CUDA's kernels but Inductor's graphs."""
    found, files = Collected(), ("tests/gpu", "tests/activations/test_kept_bytes.py")
    options = ("-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}")
    assert pytest.main([*options, *(str(ROOT / file) for file in files)], [found]) == 0
    names = found.names
    patterns = {stage: [job["tests"] for job in JOBS if job["stage"] == stage and "tests" in job] for stage in JUDGES}
    chosen: dict[str, list[str]] = {"tests": [], "more": []}
    for name in names:
        stage = "more" if reports.is_later(name) else "tests"
        chosen[stage].append(name)
        assert any(re.search(pattern, name) for pattern in patterns[stage]), f"{name} is no claim's"
    for job in JOBS:
        if "tests" in job:
            assert any(re.search(job["tests"], name) for name in chosen[job["stage"]]), f"{job['id']} has no test"
    assert not [name for name in chosen["tests"] if "TestModels" in name or "inductor" in name]
    assert not [name for name in chosen["more"] if "triton" not in name and "test_compile.py" not in name]
    for test in ("test_first_ratio_is_exactly_one", "test_loss", "test_step_and_score", "test_seeded_step"):
        assert all(any(test in n and "triton" in n for n in chosen[stage]) for stage in chosen), test


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Of a repository of its own, as if on a GPU."""
    results, out = tmp_path / "bench" / "results", tmp_path / "out"
    results.mkdir(parents=True)
    out.mkdir()
    (results / ledger.LEDGER).write_text(
        "# Ledger\n\n| date | commit | machine | command | found |\n|---|---|---|---|---|\n"
    )
    (results / ledger.JOBS).write_text((RESULTS / ledger.JOBS).read_text())
    ends = time.monotonic() + 60
    return Gate(tmp_path, out, out / "rows.jsonl", False, 1, Runner(tmp_path, out / "log", ends, ends))


HEAD = {"started": "2026-12-01T00:00:00+00:00", "commit": "abc1234", "machine": "one", "command": "gate", "dry": False}


def run(gate: Gate, monkeypatch: pytest.MonkeyPatch, commit: str, *names: str, **outcomes: Any) -> Summary:
    """Stages that write rows instead of measuring them, or raise."""

    def stage(name: str) -> Any:
        def call(gate: Gate) -> tuple[str, str]:
            outcome = outcomes[name]
            if isinstance(outcome, BaseException):
                raise outcome
            with gate.rows.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in outcome)
            return PASSED, "all | of it"

        return call

    monkeypatch.setattr(program, "EVERY", {name: stages.Stage(stage(name), 5, 5) for name in names})
    summary = Summary(gate.out, {**HEAD, "commit": commit, "rows": gate.rows.name}, names)
    program.run_all(gate, summary, dict.fromkeys(names, 5.0))
    return summary


def jobs_held(gate: Gate) -> dict[str, str]:
    return {job["id"]: job["held"] for job in ledger.jobs_of(gate.repository)}


def test_a_run_on_a_gpu_is_in_the_lists(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [{**BENCH[0], "waits": True}, *BENCH[1:]]
    summary = run(gate, monkeypatch, "abc1234", "smoke", "bench", "ncu", smoke=SMOKE, bench=bad, ncu=ValueError("no"))
    assert summary.failed == ["ncu"] and "a step waits for the device" in summary.missed
    text = (gate.repository / "bench" / "results" / ledger.LEDGER).read_text()
    (row,) = [each for each in text.splitlines() if each.startswith("| 2026-12-01")]
    assert row.count("|") == 6 and "passed: smoke (all / of it)" in row and "missed: a step waits" in row
    assert "FAILED: ncu (the gate itself failed" in row and ledger.commits(text) == {"abc1234"}
    held_now = jobs_held(gate)
    assert held_now["smoke-cuda"] == held_now["one-launch"] == held_now["copy-share"] == "abc1234"
    assert held_now["no-waits"] == held_now["ncu"] == held_now["parity"] == ledger.NEVER
    for name in (ledger.LEDGER, ledger.JOBS):
        assert (gate.out / name).read_text() == (gate.repository / "bench" / "results" / name).read_text()
    assert (gate.repository / "bench" / "results" / "rows.jsonl").read_text() == gate.rows.read_text()
    # The next run's row comes below, and what no longer holds stays at the commit where it did.
    run(gate, monkeypatch, "def5678", "bench", bench=BENCH[:1])
    assert ledger.commits((gate.out / ledger.LEDGER).read_text()) == {"abc1234", "def5678"}


@pytest.mark.parametrize("commit", ["abc1234-dirty", "no repository"])
def test_a_commit_that_is_none_holds_nothing(gate: Gate, monkeypatch: pytest.MonkeyPatch, commit: str) -> None:
    run(gate, monkeypatch, commit, "smoke", smoke=SMOKE)
    assert set(jobs_held(gate).values()) == {ledger.NEVER}
    assert ledger.commits((gate.out / ledger.LEDGER).read_text()) == {commit}


def test_a_run_that_was_ended_is_in_the_lists(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(gate, monkeypatch, "abc1234", "smoke", "bench", "ncu", smoke=SMOKE, bench=KeyboardInterrupt(), ncu=[])
    text = (gate.repository / "bench" / "results" / ledger.LEDGER).read_text()
    assert "ended before its end" in text and "running: bench. not reached: ncu" in text
    assert jobs_held(gate)["smoke-cuda"] == "abc1234"
    found = json.loads((gate.out / "gpu-gate.json").read_text())
    assert [stage["verdict"] for stage in found["stages"].values()] == [PASSED, "running", "not reached"]


def test_all_of_a_claim_holds_or_nothing() -> None:
    verdicts = [Verdict("a", True, ""), Verdict("a", False, ""), Verdict("b", True, "")]
    assert held(verdicts) == {"a": False, "b": True}
    assert str(verdicts[1]).startswith(expectations.MISSED)
