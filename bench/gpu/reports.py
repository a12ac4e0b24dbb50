"""A pytest plugin: writes a line a test and its rows when it is over, and chooses and orders the tests of the gate.

`pytest -p bench.gpu.reports --lines FILE --rows FILE --choose first`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ..rows import add, read

# Left for a second run, as compiling takes longer than the first one has: transformers of every family, and Inductor.
LATER = re.compile(r"::TestModels::|graph_trees|test_compile\.py.*inductor")
_USUAL = "float32-bfloat16-float32"
_FEW = f"(float32-float32-float32|{_USUAL}|bfloat16-bfloat16-bfloat16)"
# Of Triton's kernels, which are compiled for each mix of dtypes, those of a test that are not left.
TRITON = {
    "test_every_dtype": r"$^",
    "test_every_op_passes": r"\[.*bfloat16-bfloat16",
    "test_operands_may_lie_anywhere": r"-True-lossless",
    "test_every_width": r"-(1|1025|3072|5120)-",
    "test_first_ratio_is_exactly_one": rf"\[({_FEW}-(True|False)-exact|{_USUAL}-True-reference)",
    "test_step_and_score": rf"\[({_FEW}-(True|False)-exact|{_USUAL}-True-reference)",
    "test_seeded_step": rf"\[{_FEW}-",
    "test_loss": rf"-{_USUAL}-|\[{_USUAL}-",
}
# Tests that take much of the memory, so one worker has them all.
LARGE = re.compile(r"tests/gpu/test_large\.py|::TestMoreThan32Bits::")
# What is worth most comes first, as time may run out.
ORDER = tuple(
    re.compile(pattern)
    for pattern in (
        LARGE.pattern,
        "test_selfcheck|test_exactness",
        "test_results_equal|test_noise_is|test_first_ratio|TestParity::test_every_op",
        "test_launches|TestLaunches|test_nothing_waits",
        "test_invariance|TestBits|test_graphs|test_streams",
        "test_parity|TestParity",
    )
)


def is_later(nodeid: str) -> bool:
    """Whether a test is left for a second run."""
    name = nodeid.rpartition("::")[2].partition("[")[0]
    kept = TRITON.get(name) if "triton" in nodeid else None
    return bool(LATER.search(nodeid)) or (kept is not None and not re.search(kept, nodeid))


def rank(nodeid: str) -> int:
    """Its place among the others."""
    return next((place for place, pattern in enumerate(ORDER) if pattern.search(nodeid)), len(ORDER))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the gate."""
    parser.addoption("--lines", help="file for a JSON line a test")
    parser.addoption(
        "--rows", help="file for the rows that tests recorded as `row` or `self check`, one JSON line each"
    )
    parser.addoption("--choose", choices=("first", "later", "all"), default="all", help="which tests of the gate")
    parser.addoption("--not-again", help="file of such lines: tests that passed there are left out")


def _passed(path: str | None) -> set[str]:
    return {each["test"] for each in read(Path(path)) if each["outcome"] == "passed"} if path else set()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Chooses before xdist adds groups to the names."""
    choose, passed = config.getoption("--choose"), _passed(config.getoption("--not-again"))
    wanted = [
        item
        for item in items
        if item.nodeid not in passed and (choose == "all" or is_later(item.nodeid) == (choose == "later"))
    ]
    left = set(map(id, wanted))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in left])
    items[:] = sorted(wanted, key=lambda item: rank(item.nodeid))
    for item in items:
        if config.pluginmanager.hasplugin("xdist") and LARGE.search(item.nodeid):
            item.add_marker(pytest.mark.xdist_group("large"))


class Lines:
    """Writes lines and rows, where the tests are reported."""

    def __init__(self, path: Path, rows: Path | None) -> None:
        self.path, self.rows = path, rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of the call, or of what went wrong before or behind it."""
        test = report.nodeid.partition("@")[0]
        if report.when != "call" and report.outcome == "passed":
            return
        properties: list[Any] = list(report.user_properties)
        rows = [value for name, value in properties if name == "row"]
        checks = [json.loads(value) for name, value in properties if name == "self check"]
        add(self.rows, [*rows, *({"case": test, **check, "op": "self check"} for check in checks)])
        line = {
            "test": test,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "properties": [each for each in properties if each[0] not in ("row", "self check")],
            "reason": "" if report.outcome == "passed" else report.longreprtext[-2000:],
        }
        add(self.path, [line])


def pytest_configure(config: pytest.Config) -> None:
    """Not in the workers: their tests are reported to the process that started them."""
    path, rows = config.getoption("--lines"), config.getoption("--rows")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(Path(path), Path(rows) if rows else None), "gate-lines")
