"""The gate's stages. Each says whether it passed, and a line about it; none depends on another's success."""

import csv
import importlib.util
import io
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import summary
from .process import Runner, last_lines

# What the private copy of the repository holds.
SOURCES = ("bench", "dancegrpo_fast", "kernels", "tests", "pyproject.toml")
PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
Outcome = tuple[str, str]
# Tests that need much of the memory, so they run one after the other.
LARGE = ("tests/gpu/test_large.py", "tests/gpu/test_block_ops.py::TestMoreThan32Bits")
# Rows, the table and the stages behind need these seconds of what is left.
RESERVE = 20.0


@dataclass
class Gate:
    """What all stages share.

    Attributes:
        repository: where the gate was started.
        out: where its files go.
        rows: results file.
        dry: nothing needs a GPU.
        capability: of the GPU, as "90".
        jobs: processes at once.
        runner: runs commands in the private copy.
        asked: the stages of this run.
    """

    repository: Path
    out: Path
    rows: Path
    dry: bool
    capability: str
    jobs: int
    runner: Runner
    asked: tuple[str, ...] = ()

    def python(self, *arguments: str, **environment: str) -> tuple[int | None, str]:
        """Runs this interpreter in the private copy."""
        return self.runner.run(sys.executable, *arguments, environment=environment)

    def judged(self, status: int | None, text: str, good: str) -> Outcome:
        """Passed with `good`, or failed with the end of what was printed."""
        if status == 0:
            return PASSED, good
        self.runner.say(last_lines(text, 25))
        return FAILED, "out of time" if status is None else f"exit status {status}"


def copy_sources(repository: Path, tree: Path) -> None:
    """A private copy, so that nothing in the working tree is touched; with the compiled modules that are there."""
    left_out = shutil.ignore_patterns("__pycache__", "results", "*.so")
    for name in SOURCES:
        source, target = repository / name, tree / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=left_out, dirs_exist_ok=True)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for module in (repository / "dancegrpo_fast").glob("_c*.so"):
        shutil.copy2(module, tree / "dancegrpo_fast" / module.name)


def environment(gate: Gate) -> Outcome:
    """Versions, the GPU, and the backends with the reason where one is missing."""
    if shutil.which("nvidia-smi"):
        gate.runner.say(gate.runner.run("nvidia-smi")[1])
    for tool in ("nvcc", "cmake", "ninja", "ncu", "compute-sanitizer"):
        path = shutil.which(tool) or "/usr/local/cuda/bin/" + tool
        printed = gate.runner.run(path, "--version")[1] if Path(path).exists() else "not found"
        numbered = [line for line in printed.splitlines() if re.search(r"\d\.\d", line)]
        gate.runner.say(f"{tool}: {numbered[0] if numbered else printed}")
    status, text = gate.python("-m", "dancegrpo_fast.info")
    gate.runner.say(text)
    return gate.judged(status, text, "printed")


def build(gate: Gate) -> Outcome:
    """The CUDA and the CPU modules, for this GPU only."""
    folder = gate.repository / "build" / "gpu-gate"
    status, where = gate.python("-m", "pybind11", "--cmakedir")
    if status != 0:
        return gate.judged(status, where, "")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "DGF_CUDA": "ON",
        "DGF_CUDA_ARCHITECTURES": gate.capability,
        "pybind11_DIR": last_lines(where, 1),
        "Python_EXECUTABLE": sys.executable,
        "PYTHON_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    status, text = gate.runner.run("cmake", "-S", str(gate.repository), "-B", str(folder), "-G", "Ninja", *defines)
    if status == 0:
        status, text = gate.runner.run("cmake", "--build", str(folder), "--parallel", str(gate.jobs))
    built = sorted(folder.glob("_c*.so"))
    for module in built:
        shutil.copy2(module, gate.runner.tree / "dancegrpo_fast" / module.name)
    if status == 0 and not any(module.name.startswith("_cuda.") for module in built):
        return FAILED, "no _cuda module came out of the build"
    return gate.judged(status, text, ", ".join(module.name.partition(".")[0] for module in built))


def _gpu_tests(tree: Path) -> list[str]:
    """The folder of GPU tests and every other file that has some; others may need packages that are not here."""
    marked = [p for p in sorted((tree / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    return ["tests/gpu", *(str(p.relative_to(tree)) for p in marked if p.parent.name != "gpu")]


def tests(gate: Gate) -> Outcome:
    """Every test marked `gpu`; dry: they are collected, and those bodies run that need no GPU."""
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10"]
    files = _gpu_tests(gate.runner.tree)
    if gate.dry:
        status, text = gate.python(*options, *files, "-m", "gpu", "--collect-only")
        if status != 0:
            return gate.judged(status, text, "")
        collected = re.search(r"(\d+)(/\d+)? tests", text)
        status, text = gate.python(*options, *files, "-m", "not gpu")
        counted = collected[1] if collected else "no"
        return gate.judged(status, text, f"{counted} gpu tests collected; without a GPU: {last_lines(text, 1)}")
    outcomes = []
    workers = ["-n", str(min(12, gate.jobs))] if gate.jobs > 1 else []
    others = [f"--deselect={name}" for name in LARGE]
    for name, chosen in (("tests", [*files, *others, *workers]), ("large-tests", [*LARGE])):
        report = gate.out / f"gpu-{name}.xml"
        status, text = gate.python(*options, *chosen, "-m", "gpu", f"--junitxml={report}")
        if report.exists():
            gate.runner.say("\n".join(_properties(report)))
        if printed := re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE):
            gate.runner.say("\n".join(printed[:40]))
        if status == 0 and " passed" not in last_lines(text, 1):
            status = 5
        outcomes.append(gate.judged(status, text, last_lines(text, 1)))
    verdict = FAILED if any(verdict == FAILED for verdict, _ in outcomes) else PASSED
    return verdict, "; large: ".join(detail for _, detail in outcomes)


def _properties(report: Path) -> list[str]:
    """What tests recorded beside passing: the largest value of each, for each implementation."""
    largest: dict[tuple[str, str], int] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        implementation = next((b for b in ("cuda", "triton") if b in re.split(r"[\[\]-]", case.get("name", ""))), "")
        for entry in case.iter("property"):
            key = implementation, entry.get("name", "")
            largest[key] = max(largest.get(key, 0), int(entry.get("value", "0")))
    return [f"{implementation}: at most {value} {name}" for (implementation, name), value in sorted(largest.items())]


def bench(gate: Gate) -> Outcome:
    """The measurements; their rows are written as they come."""
    device = "dry" if gate.dry else "cuda"
    # Leaves time for the case under way and for the table.
    seconds = max(20.0, gate.runner.left() - 30.0)
    options = ["--device", device, "--seconds", f"{seconds:.0f}", "--out", str(gate.rows)]
    if gate.dry:
        options += ["--quick", "--rounds", "1", "--op", "log_prob"]
    status, text = gate.python("-m", "bench", *options)
    table = text[text.find("op  ") :] if "op  " in text else last_lines(text, 25)
    gate.runner.say(table)
    if status is None:
        return FAILED, "out of time; the rows so far are kept"
    if status != 0:
        return FAILED, f"exit status {status}, {last_lines(text, 1)}"
    return PASSED, next((line for line in text.splitlines() if " rows in " in line), "no rows")


def _measured(gate: Gate, module: str, *more: str) -> Outcome:
    """Another program of measurements of diffusers models, whose rows join the others."""
    if importlib.util.find_spec("diffusers") is None:
        return SKIPPED, "diffusers is not installed, whose blocks are measured"
    device = "dry" if gate.dry else "cuda"
    seconds = gate.runner.left() - RESERVE
    options = ["--device", device, "--seconds", f"{seconds:.0f}", "--out", str(gate.rows), *more]
    status, text = gate.python("-m", module, *options)
    gate.runner.say(text[text.find("op  ") :] if "op  " in text else last_lines(text, 25))
    if status is None:
        return FAILED, "out of time; the rows so far are kept"
    if status != 0:
        return FAILED, f"exit status {status}, {last_lines(text, 1)}"
    return PASSED, next((line for line in text.splitlines() if " rows in " in line), "no rows")


def blocks(gate: Gate) -> Outcome:
    """The ops of transformer blocks, and blocks, at real sizes."""
    return _measured(gate, "bench.gpu.blocks", *(["--rounds", "1", "--only", "HunyuanVideo"] if gate.dry else []))


def memory(gate: Gate) -> Outcome:
    """What the planner predicts, against what the GPU allocates; and which attention takes a mask."""
    return _measured(gate, "bench.gpu.memory")


def expectations(gate: Gate) -> Outcome:
    """What was expected of the numbers, and whether it is so."""
    if not gate.rows.exists():
        return SKIPPED, "there are no rows"
    rows = summary.read(gate.rows)
    judged = {"bench": summary.transition_lines, "blocks": summary.block_lines, "memory": summary.memory_lines}
    # A run of some stages is not to be blamed for what another one measures.
    measured = [name for name in judged if name in gate.asked] or list(judged)
    lines = [line for name in measured for line in judged[name](rows)]
    gate.runner.say("\n".join(lines))
    missed = [line for line in lines if line.startswith(summary.MISSED)]
    if gate.dry:
        return PASSED, "written; dry rows are no measurements"
    return (FAILED if missed else PASSED), f"{len(lines) - len(missed)} of {len(lines)} met"


def _tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the PATH or where the toolkit puts it."""
    beside = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


def _sanitizer(gate: Gate, tool: str) -> Outcome:
    if gate.dry:
        for backend, more in (("cpu", []), ("reference", ["--blocks"])):
            status, text = gate.python("-m", "bench.gpu.driver", "cpu", backend, *more)
            if status != 0:
                break
        return gate.judged(status, text, "only the driver program ran, on the CPU")
    program = _tool("compute-sanitizer")
    if program is None:
        return SKIPPED, "compute-sanitizer is not installed"
    done: list[str] = []
    ours = ["--kernel-regex", "kns=dgf"]
    # The newest last: what runs out of time costs nothing before it.
    for name, only, called in (
        ("cuda", ours, ["cuda"]),
        ("triton", [], ["triton"]),
        ("block ops", [], ["triton", "--blocks"]),
    ):
        options = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20", *only]
        # Each tensor in an allocation of its own, so that an access beside it is seen.
        status, text = gate.runner.run(
            *options,
            *(sys.executable, "-m", "bench.gpu.driver", "cuda", *called),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        if status == 86:
            return gate.judged(status, text, "")
        if status is None and done:
            return SKIPPED, f"clean for {', '.join(done)}; out of time for {name}"
        if status != 0:
            reason = "out of time" if status is None else last_lines(text, 3)
            if "every op was called" in text or "Invalid" in text or "Race reported" in text:
                return gate.judged(status, text, "")
            return SKIPPED, f"{', '.join(done) or 'nothing'} checked; {name}: does not work here: {reason}"
        if "0 errors" not in text and "0 hazards" not in text:
            return SKIPPED, f"{name}: no verdict: {last_lines(text, 1)}"
        done.append(name)
    return PASSED, f"clean for {', '.join(done)}"


def memcheck(gate: Gate) -> Outcome:
    """Accesses beside what was allocated."""
    return _sanitizer(gate, "memcheck")


def racecheck(gate: Gate) -> Outcome:
    """Races in shared memory."""
    return _sanitizer(gate, "racecheck")


METRICS = (
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "gpu__time_duration.sum",
    "launch__registers_per_thread",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def profiled(text: str) -> list[str]:
    """A line per kernel and metric of ncu's CSV, between whatever else was printed."""
    table = "\n".join(line for line in text.splitlines() if line.startswith('"'))
    return [
        f"{row['Kernel Name'].partition('(')[0]}: {row['Metric Name']} {row['Metric Value']} {row['Metric Unit']}"
        for row in csv.DictReader(io.StringIO(table))
        if row.get("Metric Name") in METRICS
    ]


def ncu(gate: Gate) -> Outcome:
    """The share of the memory's throughput in one sampling step and one loss of 8 x 806,400."""
    if gate.dry:
        status, text = gate.python("-m", "bench.gpu.driver", "cpu", "cpu", "--size", "1000")
        return gate.judged(status, text, "only the driver program ran, on the CPU")
    program = _tool("ncu")
    if program is None:
        return SKIPPED, "ncu is not installed"
    status, text = gate.runner.run(
        program,
        *("--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)),
        *("--kernel-name", "regex:transition_sample|policy_loss", "--launch-count", "4"),
        *(sys.executable, "-m", "bench.gpu.driver", "cuda", "cuda", "--size", "806400"),
    )
    lines = profiled(text)
    if not lines:
        reason = "out of time" if status is None else last_lines(text, 2)
        return SKIPPED, f"ncu does not work here: {reason}"
    gate.runner.say("\n".join(lines))
    return PASSED, f"{len(lines)} values"


@dataclass(frozen=True)
class Stage:
    """A stage, and the seconds after which its commands are ended."""

    run: Callable[[Gate], Outcome]
    seconds: int


# The measurements come early, so that a slow tool cannot cost them.
STAGES = {
    "build": Stage(build, 150),
    "environment": Stage(environment, 30),
    "tests": Stage(tests, 180),
    "bench": Stage(bench, 220),
    "blocks": Stage(blocks, 150),
    "memory": Stage(memory, 150),
    "expectations": Stage(expectations, 5),
    "memcheck": Stage(memcheck, 50),
    "racecheck": Stage(racecheck, 50),
    "ncu": Stage(ncu, 40),
}
