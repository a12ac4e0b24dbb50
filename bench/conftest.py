"""`pytest bench/`: options, and the fixture that a case hands its contenders to; the method is in README.md."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# `bench` and `tests` lie beside the installed package: their folder comes last, so that the installed one is measured.
sys.path.append(str(Path(__file__).parents[1]))

from bench.environment import environment
from bench.place import NAMES, Place, place_of
from bench.repository import RESULTS
from bench.rows import Row
from bench.turns import PEERS, TIMER, Contest, Turns

OUT_OF_TIME = "out of time"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the cases; rounds and time are pytest-benchmark's."""
    group = parser.getgroup("cases")
    group.addoption("--device", choices=NAMES, default="cpu", help="dry: the GPU's run on a few CPU elements")
    group.addoption("--threads", type=int, help="torch threads (default torch's own)")
    group.addoption("--seconds", type=float, help="start no case that would not end within them")
    group.addoption("--ahead", action="store_true", help="only compile what cases compile, for a run after this one")


def pytest_configure(config: pytest.Config) -> None:
    """Results are beside the cases, unless another folder is named."""
    config.addinivalue_line("markers", "full: left out of `make bench`")
    config.addinivalue_line("markers", "takes(seconds): of a case, as a case that is compiled does")
    if str(getattr(config.option, "benchmark_storage", "")).endswith("./.benchmarks"):
        config.option.benchmark_storage = f"file://{RESULTS}"
        config.option.benchmark_columns = config.option.benchmark_columns or ["median", "min", "max", "rounds"]
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)
    elif config.getoption("--device") == "dry":
        torch.set_num_threads(1)


def _case(item: Any) -> Any:
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is worth most first; on pytest-benchmark's timer our clocks' times pass."""
    items.sort(key=lambda item: getattr(_case(item), "rank", 0))
    contests = [item for item in items if "contest" in getattr(item, "fixturenames", ())]
    for item in contests if config.pluginmanager.hasplugin("benchmark") else []:
        item.add_marker(pytest.mark.benchmark(timer=TIMER))
    if config.getoption("--ahead"):
        # A case compiles for all of its contenders.
        first = {_name(item): item for item in reversed(contests)}
        items[:] = [item for item in contests if first[_name(item)] is item]


def _name(item: Any) -> str:
    """Of a case, whoever contends."""
    case = _case(item)
    if case is None:
        return str(item.callspec.id)
    return f"{item.originalname.removeprefix('test_').replace('_', ' ')} {case}"


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Place:
    """Where the cases run."""
    return place_of(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def turns(request: pytest.FixtureRequest, place: Place) -> Turns:
    """The case in hand."""
    # What was imported is not looked through after every case.
    gc.collect()
    gc.freeze()
    option = request.config.getoption
    return Turns(place, option("benchmark_min_rounds"), float(option("benchmark_max_time")))


@pytest.fixture(scope="session")
def start(request: pytest.FixtureRequest) -> Callable[[pytest.Item], None]:
    """Call it when a case begins: it skips one that would end too late, as long as the longest one up to now takes."""
    begin, limit = time.monotonic(), request.config.getoption("--seconds")
    last, longest = begin, 0.0

    def started(item: pytest.Item) -> None:
        nonlocal last, longest
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        marker = item.get_closest_marker("takes")
        needed = marker.args[0] if marker and request.config.getoption("--device") == "cuda" else longest
        if limit is not None and now - begin + needed > limit:
            pytest.skip(OUT_OF_TIME)

    return started


@pytest.fixture
def keep(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None], place: Place
) -> Callable[[Row], None]:
    """For a case that is no benchmark: begins it, and takes the row that it made."""
    request.getfixturevalue("start")(request.node)
    where = environment(place.device, dry=place.dry)
    return lambda row: record_property("row", {"case": _name(request.node), **row, "environment": where})


@pytest.fixture
def contest(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None], contender: str
) -> Callable[[Callable[[], Contest]], None]:
    """Call it with what makes the contenders of the case: `contender` is measured in turns with the others."""
    benchmark, turns = request.getfixturevalue("benchmark"), request.getfixturevalue("turns")
    name = benchmark.group = _name(request.node)
    if turns.case != name:
        request.getfixturevalue("start")(request.node)

    def run(make: Callable[[], Contest]) -> None:
        made = turns.begin(name, make)
        if request.config.getoption("--ahead"):
            benchmark.pedantic(lambda: [call(0) for call in made.calls.values()])
            return
        if not benchmark.enabled:
            turns.verify(contender)
            turns.refuse(contender)
            benchmark.pedantic(made.calls[contender], (0,))
            return
        if not turns.samples:
            turns.measure()
        turns.refuse(contender)
        turns.replay(benchmark, contender)
        benchmark.extra_info |= turns.info(contender)
        microseconds = {f"us_{what}": 1e6 * benchmark.stats.get(what) for what in ("median", "min", "max")}
        row = {"case": name, **benchmark.extra_info, **microseconds, "rounds": benchmark.stats.get("rounds")}
        record_property("row", row)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Ours against each peer in one line, and what is slower than it or off its budget."""
    benchmarks = getattr(getattr(config, "_benchmarksession", None), "benchmarks", [])
    known = [(b.group, b.extra_info) for b in benchmarks if "backend" in b.extra_info]
    rows = [(f"{group}, {row['backend']}", row) for group, row in known]
    for peer in PEERS:
        times = {name: row.get(f"times_{peer}") for name, row in rows if row["backend"] not in PEERS}
        ours = {name: each for name, each in times.items() if each is not None}
        if found := list(ours.values()):
            slower = [f"  slower than {peer}: {name} ({each:.2f})\n" for name, each in ours.items() if each < 1]
            spread = f"{min(found):.3g} to {max(found):.3g} (median {statistics.median(found):.3g})"
            terminalreporter.write(f"{len(ours)} timings of ours: {spread} x {peer}; {len(slower)} slower\n")
            terminalreporter.write("".join(slower))
    terminalreporter.write("".join(f"  off budget: {name}\n" for name, row in rows if not row["within_budget"]))
