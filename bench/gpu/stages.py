"""The gate's stages in the order of their worth. Each says whether it passed; none depends on another's success."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..rows import Row, read
from . import tools
from .gate import CUT, FAILED, PASSED, SKIPPED, TESTS, Gate, Outcome
from .modules import modules
from .process import last_lines

# Of a stage's seconds, what its cases leave for the one under way and for their table.
RESERVE = 8.0
# Of the time, what compiling in many processes may take.
AHEAD_SHARE = 0.35
OUT_OF_TIME = "out of time"
# In a dry run, what shows that tests run.
DRY_TESTS = ("tests/gpu/test_streams.py",)
RL_CASES = tuple(f"bench/ops/bench_{op}.py" for op in ("transition", "policy_loss"))
BLOCK_OPS = ("gelu_tanh", "norm_modulate", "gated_residual", "qk_norm_rope", "lora_linear")
BLOCK_CASES = tuple(f"bench/ops/bench_{name}.py" for name in (*BLOCK_OPS, "block_pair"))
RAGGED_CASES = ("bench/ops/bench_ragged.py",)


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


def _pytest(gate: Gate, files: Sequence[str], *options: str) -> tuple[int | None, str, list[Row]]:
    """Exit status, what was printed, and a line a test of these files, which lie on disk as tests end, as rows do."""
    lines = gate.out / TESTS
    again = ["--not-again", str(lines)] if gate.resume else []
    shared = (
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.gpu.reports",
        "--lines",
        str(lines),
        "--rows",
        str(gate.rows),
    )
    status, text = gate.python("-m", "pytest", *shared, *again, *options, *files)
    found = {line["test"]: line for line in read(lines) if line["test"].startswith(tuple(files))}
    if printed := re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE):
        gate.runner.say("\n".join(printed[:40]))
    # Where all of them had passed before, nothing is left to collect.
    return 0 if status == 5 and gate.resume and found else status, text, list(found.values())


def _counted(lines: list[Row]) -> str:
    outcomes = [line["outcome"] for line in lines]
    return ", ".join(f"{outcomes.count(each)} {each}" for each in ("passed", "failed", "skipped"))


def _tests(gate: Gate, choose: str) -> Outcome:
    """Tests marked `gpu`; dry: a file of those bodies that need no GPU."""
    files = list(DRY_TESTS) if gate.dry else _gpu_tests(gate.runner.tree)
    workers = ["-n", str(min(12, gate.jobs)), "--dist", "loadgroup"] if gate.jobs > 1 and not gate.dry else []
    options = ["-m", "not gpu" if gate.dry else "gpu", "--choose", "all" if gate.dry else choose]
    status, text, found = _pytest(gate, files, *options, *(workers if gate.found.get("xdist") else []))
    gate.runner.say("\n".join(_largest(found)))
    if status == 0 and not any(line["outcome"] == "passed" for line in found):
        status = 5
    verdict, detail = gate.judged(status, text, _counted(found))
    return verdict, detail if verdict == PASSED else f"{detail}; {_counted(found)}"


def _largest(lines: list[Row]) -> list[str]:
    """What tests recorded beside passing: the largest number of each, for each implementation."""
    largest: dict[tuple[str, str], int] = {}
    for line in lines:
        words = re.split(r"[\[\]-]", line["test"])
        implementation = next((b for b in ("cuda", "triton") if b in words), "")
        for name, value in line["properties"]:
            if isinstance(value, int):
                key = implementation, name
                largest[key] = max(largest.get(key, 0), value)
    return [f"{implementation}: at most {value} {name}" for (implementation, name), value in sorted(largest.items())]


def tests(gate: Gate) -> Outcome:
    """Without transformers, Inductor and most mixes of dtypes."""
    return _tests(gate, "first")


def more(gate: Gate) -> Outcome:
    """The tests that `tests` leaves out."""
    return _tests(gate, "later")


def _missing(gate: Gate, *packages: str) -> Outcome | None:
    """Why a stage is skipped, if it is."""
    absent = [name for name in packages if not gate.found.get(name)]
    wheels = "bring the wheels that --prepare fetches with --wheels"
    return (SKIPPED, f"{', '.join(absent)}: not installed; {wheels}") if absent else None


def _cases(gate: Gate, files: Sequence[str], *options: str) -> Outcome:
    """Cases of `bench`, whose rows join the others."""
    limit = max(1.0, gate.runner.left() - RESERVE)
    status, text, found = _pytest(gate, files, "--device", gate.device, "--seconds", f"{limit:.0f}", *options)
    gate.runner.say(text[text.find("---- benchmark") :] if "---- benchmark" in text else last_lines(text, 25))
    if status is None:
        return FAILED, "out of time; the rows so far are kept"
    late = [line["test"].rpartition("::")[2] for line in found if OUT_OF_TIME in line["reason"]]
    bad = [line["test"].rpartition("::")[2] for line in found if line["outcome"] == "failed"]
    if status != 0 or not found:
        return FAILED, f"exit status {status}, {_counted(found)}; {', '.join(bad) or last_lines(text, 1)}"
    return (CUT, f"{_counted(found)}; {OUT_OF_TIME} for: {', '.join(late)}") if late else (PASSED, _counted(found))


def _rounds(gate: Gate) -> list[str]:
    few, seconds = ("1", "0") if gate.dry else ("5", "0.1")
    return ["--benchmark-min-rounds", few, "--benchmark-max-time", seconds]


def bench(gate: Gate) -> Outcome:
    """What a call costs the host and launches, then the timings."""
    if missing := _missing(gate, "pytest_benchmark"):
        return missing
    # In a process of its own: a profiler slows the calls after it.
    first = _cases(gate, ["bench/ops/bench_host.py"], *_rounds(gate))
    quick = ["-m", "not full", *(["-k", "log_prob"] if gate.dry else [])]
    then = _cases(gate, RL_CASES, *_rounds(gate), *quick)
    verdict = next((each for each in (FAILED, CUT) if each in (first[0], then[0])), PASSED)
    return verdict, f"host and launches: {first[1]}; cases: {then[1]}"


def blocks(gate: Gate) -> Outcome:
    """The ops of transformer blocks, and blocks, at real sizes."""
    if missing := _missing(gate, "pytest_benchmark", "diffusers"):
        return missing
    if gate.dry:
        few = [case for case in BLOCK_CASES if re.search("gelu|lora", case)]
        return _cases(gate, few, *_rounds(gate), "-k", "(plain or to_q) and HunyuanVideo")
    if gate.jobs > 1 and gate.found.get("xdist"):
        begin = time.monotonic()
        workers = ("-n", str(gate.jobs), "-p", "no:cacheprovider", "--device", gate.device)
        command = ("-m", "pytest", "-q", "--ahead", *workers, *BLOCK_CASES)
        gate.python(*command, seconds=AHEAD_SHARE * gate.runner.left())
        gate.runner.say(f"compiled ahead: {time.monotonic() - begin:.0f} s")
    return _cases(gate, BLOCK_CASES, *_rounds(gate))


def ragged(gate: Gate) -> Outcome:
    """Attention of prompts of unequal length: with the mask, by varlen kernels, by a call for each sample."""
    few = ["-k", "peer or native and not cudnn"] if gate.dry else []
    return _missing(gate, "pytest_benchmark", "diffusers") or _cases(gate, RAGGED_CASES, *_rounds(gate), *few)


def memory(gate: Gate) -> Outcome:
    """What the planner predicts, against what the GPU allocates and reserves; and which attention takes a mask."""
    few = ["-k", "attention and not flash and not cudnn"] if gate.dry else []
    return _missing(gate, "diffusers") or _cases(gate, ["bench/gpu/memory/bench_memory.py"], *few)


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
LATER = {"ragged": Stage(ragged, 25, 25), "more": Stage(more, 120, 120)}
EVERY = STAGES | LATER
# Of the whole gate, and of a second run; somewhat more than the stages, for its own start.
SECONDS, SECONDS_AGAIN = 480, 180


def seconds_of(names: list[str], prebuilt: bool, most: float) -> dict[str, float]:
    """Stage -> its seconds; shares of `most` where they are more together."""
    each = {name: float(EVERY[name].prebuilt if prebuilt else EVERY[name].built) for name in names}
    return {name: seconds * min(1.0, most / sum(each.values())) for name, seconds in each.items()}
