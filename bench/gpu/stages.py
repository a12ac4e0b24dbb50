"""The gate's stages in the order of their worth. Each says whether it passed; none depends on another's success."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..rows import Rows, read
from . import tools
from .gate import CUT, FAILED, PASSED, SKIPPED, TESTS, Gate, Outcome
from .modules import modules
from .process import last_lines

# Of a stage's seconds, what its programs leave for the case under way and for their table.
RESERVE = 8.0
# In a dry run: of each program, what shows that it runs.
DRY_TESTS = ("tests/gpu/test_streams.py",)
DRY_BLOCKS = "gelu_tanh, plain, HunyuanVideo"
DRY_MEMORY = "attention memory, native, mask|_native_efficient, mask"


def _versions(gate: Gate) -> None:
    """Of the driver and the tools."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv,noheader")
    for command in (query, *((name, "--version") for name in ("nvcc", "cmake", "ncu", "compute-sanitizer"))):
        path = tools.tool(command[0])
        printed = gate.runner.run(path, *command[1:])[1] if path else "not found"
        numbered = [line for line in printed.splitlines() if re.search(r"\d\.\d", line)]
        gate.runner.say(f"{command[0]}: {numbered[0] if numbered else last_lines(printed, 1)}")


def smoke(gate: Gate) -> Outcome:
    """Versions, and a first call of everything; its lines are printed as they come."""
    options = ["--device", gate.device, "--out", str(gate.rows), "--jobs", str(1 if gate.dry else gate.jobs)]
    status, text = gate.python("-m", "bench.gpu.smoke", *options, echo=True)
    _versions(gate)
    counted = f"{len(re.findall('^good ', text, re.MULTILINE))} checks agree"
    if status == 0:
        return PASSED, counted
    bad = re.findall(r"^BAD  (.*?), [\d.]+ s:", text, re.MULTILINE)
    return (
        FAILED,
        f"{counted}; {'out of time' if status is None else f'exit status {status}'}; bad: {', '.join(bad) or 'none'}",
    )


def _gpu_tests(tree: Path) -> list[str]:
    """The folder of GPU tests and every other file that has some; others may need packages that are not here."""
    marked = [p for p in sorted((tree / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    return ["tests/gpu", *(str(p.relative_to(tree)) for p in marked if p.parent.name != "gpu")]


def _pytest(gate: Gate, choose: str) -> Outcome:
    """Tests marked `gpu`, a line each in a file as they end; dry: a file of those bodies that need no GPU."""
    lines = gate.out / TESTS
    again = [] if not gate.resume else ["--not-again", str(lines)]
    files = list(DRY_TESTS) if gate.dry else _gpu_tests(gate.runner.tree)
    workers = ["-n", str(min(12, gate.jobs)), "--dist", "loadgroup"] if gate.jobs > 1 and not gate.dry else []
    workers = workers if gate.found.get("xdist") else []
    status, text = gate.python(
        *(
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "bench.gpu.reports",
            "-m",
            "not gpu" if gate.dry else "gpu",
        ),
        *("--lines", str(lines), "--choose", "all" if gate.dry else choose, *again, *workers, *files),
    )
    found = {line["test"]: line for line in read(lines)}
    _keep_self_checks(gate, list(found.values()))
    if printed := re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE):
        gate.runner.say("\n".join(printed[:40]))
    outcomes = [line["outcome"] for line in found.values()]
    counted = ", ".join(f"{outcomes.count(each)} {each}" for each in ("passed", "failed", "skipped"))
    gate.runner.say("\n".join(_largest(list(found.values()))))
    # Where all of them had passed before, nothing is left to collect.
    if status == 5 and gate.resume and found:
        status = 0
    if status == 0 and "passed" not in outcomes:
        status = 5
    verdict, detail = gate.judged(status, text, counted)
    return verdict, detail if verdict == PASSED else f"{detail}; {counted}"


def _keep_self_checks(gate: Gate, lines: list[dict[str, object]]) -> None:
    rows = Rows(gate.rows, lambda row: row["op"] == "self check")
    for line in lines:
        properties = line["properties"]
        assert isinstance(properties, list)
        checks = [{**json.loads(value), "op": "self check"} for name, value in properties if name == "self check"]
        if checks:
            rows.add(str(line["test"]), checks)


def _largest(lines: list[dict[str, object]]) -> list[str]:
    """What tests recorded beside passing: the largest number of each, for each implementation."""
    largest: dict[tuple[str, str], int] = {}
    for line in lines:
        words = re.split(r"[\[\]-]", str(line["test"]))
        implementation = next((b for b in ("cuda", "triton") if b in words), "")
        properties = line["properties"]
        assert isinstance(properties, list)
        for name, value in properties:
            if isinstance(value, int):
                key = implementation, name
                largest[key] = max(largest.get(key, 0), value)
    return [f"{implementation}: at most {value} {name}" for (implementation, name), value in sorted(largest.items())]


def tests(gate: Gate) -> Outcome:
    """Without transformers, Inductor and most mixes of dtypes."""
    return _pytest(gate, "first")


def more(gate: Gate) -> Outcome:
    """The tests that `tests` leaves out."""
    return _pytest(gate, "later")


def _program(gate: Gate, module: str, *options: str, seconds: float | None = None) -> Outcome:
    """A program of measurements, whose rows join the others."""
    limit = max(1.0, (gate.runner.left() if seconds is None else seconds) - RESERVE)
    shared = ["--device", gate.device, "--seconds", f"{limit:.0f}", "--out", str(gate.rows)]
    status, text = gate.python("-m", module, *shared, *(["--resume"] if gate.resume else []), *options)
    gate.runner.say(text[text.find("op  ") :] if "op  " in text else last_lines(text, 25))
    rows = next((line for line in text.splitlines() if re.match(r"\d+ rows", line)), "no rows")
    if status is None:
        return FAILED, "out of time; the rows so far are kept"
    if status != 0:
        return FAILED, f"exit status {status}, {last_lines(text, 1)}"
    if late := re.search(r"^out of time for: (.*)", text, re.MULTILINE):
        return CUT, f"{rows.partition(' in ')[0]}; {late[0]}"
    return PASSED, rows.partition(" in ")[0]


def bench(gate: Gate) -> Outcome:
    """What a call costs the host and launches, then the timings."""
    dry = ["--rounds", "1"] if gate.dry else []
    first = _program(gate, "bench", "--quick", "--only", "host", *dry)
    then = _program(gate, "bench", "--quick", "--only", "cases", *dry, *(["--op", "log_prob"] if gate.dry else []))
    verdict = next((each for each in (FAILED, CUT) if each in (first[0], then[0])), PASSED)
    return verdict, f"host and launches: {first[1]}; cases: {then[1]}"


def blocks(gate: Gate) -> Outcome:
    """The ops of transformer blocks, and blocks, at real sizes."""
    if not gate.found.get("diffusers"):
        return SKIPPED, "diffusers is not installed, whose blocks are measured"
    if gate.dry:
        return _program(gate, "bench.gpu.blocks", "--rounds", "1", "--only", DRY_BLOCKS)
    return _program(gate, "bench.gpu.blocks", "--jobs", str(gate.jobs))


def memory(gate: Gate) -> Outcome:
    """What the planner predicts, against what the GPU allocates and reserves; and which attention takes a mask."""
    if not gate.found.get("diffusers"):
        return SKIPPED, "diffusers is not installed, whose models are measured"
    return _program(gate, "bench.gpu.memory", *(["--only", DRY_MEMORY] if gate.dry else []))


@dataclass(frozen=True)
class Stage:
    """A stage, the seconds that it has, and those that it has where the modules were built here before.

    What a stage leaves over is the next one's.
    """

    run: Callable[[Gate], Outcome]
    prebuilt: int
    built: int


# The measurements come early, so that a slow tool cannot cost them. A build takes its seconds from the four longest.
STAGES = {
    "modules": Stage(modules, 5, 50),
    "smoke": Stage(smoke, 20, 20),
    "tests": Stage(tests, 90, 80),
    "bench": Stage(bench, 75, 65),
    "blocks": Stage(blocks, 110, 100),
    "memory": Stage(memory, 60, 50),
    "memcheck": Stage(tools.memcheck, 45, 45),
    "racecheck": Stage(tools.racecheck, 40, 40),
    "ncu": Stage(tools.ncu, 25, 25),
}
# For a second run.
LATER = {"more": Stage(more, 120, 120)}
EVERY = STAGES | LATER
# Of the whole gate, and of a second run; somewhat more than the stages, for its own start.
SECONDS, SECONDS_AGAIN = 480, 180


def seconds_of(names: list[str], prebuilt: bool, most: float) -> dict[str, float]:
    """Stage -> its seconds; shares of `most` where they are more together."""
    each = {name: float(EVERY[name].prebuilt if prebuilt else EVERY[name].built) for name in names}
    return {name: seconds * min(1.0, most / sum(each.values())) for name, seconds in each.items()}
