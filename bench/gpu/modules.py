"""The compiled modules of a run: built here, or built before and brought along; and other packages that are."""

import hashlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .gate import FAILED, PASSED, Gate, Outcome
from .process import last_lines

# What the private copy of the repository holds.
SOURCES = ("bench", "dancegrpo_fast", "kernels", "tests", "pyproject.toml")
# What --prepare fetches: the models whose blocks are measured, and what measures.
WHEELS = ("diffusers", "pytest-benchmark", "py-cpuinfo2", "pytest-xdist", "execnet")
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
# In a folder that was prepared: what its modules were compiled from.
SOURCES_FILE = "sources.sha256"
NATIVE = (".h", ".hpp", ".cpp", ".cu", ".cuh", "CMakeLists.txt")
NAMES = ("_cpu", "_cpu_v3", "_cpu_v4", "_cuda") if platform.machine() in ("x86_64", "AMD64") else ("_cpu", "_cuda")


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
    take(sorted((repository / "dancegrpo_fast").glob("_c*.so")), tree)


def take(modules: Iterable[Path], tree: Path) -> None:
    """Into the private copy."""
    for module in modules:
        shutil.copy2(module, tree / "dancegrpo_fast" / module.name)


def unpack(wheels: Path, target: Path) -> list[str]:
    """Unpacks every wheel of a folder for this run; returns their names."""
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return [wheel.name for wheel in found]


def fingerprint(repository: Path) -> str:
    """Of all that a compiler reads."""
    found = hashlib.sha256((repository / "CMakeLists.txt").read_bytes())
    for folder in ("csrc", "kernels"):
        for path in sorted((repository / folder).rglob("*")):
            if path.name.endswith(NATIVE):
                found.update(path.relative_to(repository).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def outdated(folder: Path, repository: Path) -> list[str]:
    """Whether modules were compiled from other sources; nothing where that is not known."""
    path = folder / SOURCES_FILE
    same = not path.exists() or path.read_text().strip() == fingerprint(repository)
    return [] if same else [f"{path.name}: got modules of other sources, want those of this repository"]


def misnamed(folder: Path) -> list[str]:
    """Modules that are not there for this interpreter, each with what is."""
    problems = []
    for name in NAMES:
        there = sorted(path.name for path in folder.glob(f"{name}.*"))
        if f"{name}{SUFFIX}" not in there:
            problems.append(f"{name}: got {', '.join(there) or 'no file'}, want {name}{SUFFIX}")
    return problems


def unfit(found: dict[str, Any], capability: str) -> list[str]:
    """Modules that `look` could not load, or that belong to another version or another GPU."""
    problems = []
    for name, module in found["modules"].items():
        if "error" in module:
            problems.append(f"{name}: got a module that does not load ({module['error']}), want one built for here")
        elif module["columns"] != found["columns"]:
            problems.append(f"{name}: got table_columns {module['columns']}, want {found['columns']}")
        elif name == "_cuda" and capability and capability not in module["architectures"].split(","):
            problems.append(f"{name}: got architectures {module['architectures']}, want {capability} among them")
    return problems


def bring(gate: Gate) -> str:
    """Takes modules that were brought along, looks at what is there, and says in `gate.refused` why they are not used.

    Returns why nothing could be looked at, or nothing.
    """
    if gate.prebuilt is not None:
        gate.refused = outdated(gate.prebuilt, gate.repository) or misnamed(gate.prebuilt)
        if not gate.refused:
            take([gate.prebuilt / f"{name}{SUFFIX}" for name in NAMES], gate.runner.tree)
    problem = gate.look(NAMES)
    if gate.prebuilt is None or gate.refused:
        return problem
    if problem:
        # A module that ends the process that loads it.
        gate.refused = [problem]
        return gate.look(())
    gate.refused = unfit(gate.found, gate.capability)
    return ""


def compile_all(gate: Gate, architectures: str) -> tuple[int | None, str, list[Path]]:
    """Exit status, what was printed, and the modules."""
    # A configuration of another interpreter would be kept.
    folder = gate.repository / "build" / f"gpu-modules{SUFFIX}"
    status, where = gate.python("-m", "pybind11", "--cmakedir")
    if status != 0:
        return status, where, []
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "DGF_CUDA": "ON",
        "DGF_CUDA_ARCHITECTURES": architectures,
        "pybind11_DIR": last_lines(where, 1),
        "Python_EXECUTABLE": sys.executable,
        "PYTHON_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    status, text = gate.runner.run("cmake", "-S", str(gate.repository), "-B", str(folder), "-G", "Ninja", *defines)
    if status == 0:
        status, text = gate.runner.run("cmake", "--build", str(folder), "--parallel", str(gate.jobs))
    return status, text, sorted(folder.glob(f"_c*{SUFFIX}"))


def modules(gate: Gate) -> Outcome:
    """Takes those that were brought along, where they are right; else builds them for this GPU only."""
    if gate.prebuilt is not None and not gate.refused:
        return PASSED, f"brought along: {', '.join(NAMES)}"
    said = f"refused of those brought along: {'; '.join(gate.refused)}; " if gate.refused else ""
    if gate.dry:
        return (FAILED, said) if said else (PASSED, "of the source folder; nothing was built")
    status, text, built = compile_all(gate, gate.capability)
    take(built, gate.runner.tree)
    if status == 0 and not any(module.name.startswith("_cuda.") for module in built):
        return FAILED, said + "no _cuda module came out of the build"
    verdict, detail = gate.judged(status, text, f"built: {', '.join(m.name.partition('.')[0] for m in built)}")
    return verdict, said + detail


def prepare(gate: Gate, folder: Path, architectures: str) -> str:
    """Compiles modules for this interpreter and fetches wheels, for a machine that has no network.

    Returns what went wrong, or nothing.
    """
    status, text, built = compile_all(gate, architectures.replace(",", ";"))
    if status != 0:
        return last_lines(text, 25)
    for module in built:
        shutil.copy2(module, folder / module.name)
    (folder / SOURCES_FILE).write_text(fingerprint(gate.repository) + "\n")
    if problems := misnamed(folder):
        return "\n".join(problems)
    pins = dict(line.split("==") for line in (gate.repository / "constraints.txt").read_text().split() if "==" in line)
    wanted = [f"{name}=={pins[name]}" if name in pins else name for name in WHEELS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    fetched = subprocess.run([*command, "--dest", str(folder), *wanted], capture_output=True, text=True)
    return "" if fetched.returncode == 0 else last_lines(fetched.stderr, 5)
