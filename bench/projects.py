"""`python -m bench.projects FOLDER ...`: what `run` does with every script of checked-out projects.

Each script with a `__main__` guard is looked through by `run --dry-run`. Those with a candidate are run, in a process
of their own and with `--help` for arguments, where a module that is not installed is a stand-in that does nothing. Then
every known function that the script defined or imported is called once on small tensors, so that it is compared with
ours. The table says what was found, what ours took over, what was refused and why.
"""

import argparse
import ast
import builtins
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dancegrpo_fast.dropin.source import definitions

_GUARD = re.compile(r"__name__\s*==\s*['\"]__main__['\"]")
_SECONDS = 300
_HERE = Path(__file__).resolve().parents[1]


class _Absent:
    """What a module that is not installed holds: it can be called, subclassed, decorated with and asked for more."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else _Absent()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing."""


class _AbsentModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last: an empty module for what a project's own files import and no other finder knows."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = str(root), set[str]()
        # A file of the project itself that is missing is a fault of the project, and said.
        self.own = {path.stem for path in root.iterdir()}

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        # A name that an installed package lacks is no module of it.
        installed = top in sys.modules and top not in self.made
        if top in self.own or installed or not (top in self.made or self._asked_by_project()):
            return None
        self.made.add(top)
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = []
        return spec

    def _asked_by_project(self) -> bool:
        # Installed packages ask for what may be missing, too, and must be told so.
        frame = sys._getframe(2)
        while frame.f_back and "importlib" in frame.f_code.co_filename:  # <frozen importlib._bootstrap>, too
            frame = frame.f_back
        return frame.f_code.co_filename.startswith(self.root)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = _Absent().__getattr__  # type: ignore[method-assign]  # modules may have one
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing."""


def _scheduler(name: str, video: bool) -> Any:
    """The scheduler whose timesteps a function with a `self` reads."""
    import diffusers

    if name.startswith("ddim"):
        made = diffusers.DDIMScheduler(clip_sample=False)
    elif video:
        made = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    else:
        made = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return made


def arguments(function: Any, owner: type | None) -> dict[str, Any]:
    """Small tensors by the name of the parameter; what has a default keeps it."""
    import torch

    named: dict[str, Any] = {}
    parameters = inspect.signature(function).parameters
    video = "determistic" in parameters and "timestep" in parameters
    shape = (2, 4, 3, 8, 8) if video else (2, 4, 8, 8)
    for parameter in parameters.values():
        name = parameter.name
        if name == "self":
            if owner is None:
                made = _scheduler(function.__name__, video)
            elif "UniPC" in owner.__name__:
                made = owner(prediction_type="flow_prediction", use_flow_sigmas=True)
            else:
                made = owner(shift=3.0)
            made.set_timesteps(8)
            named[name] = made
        elif name in ("model_output", "noise_pred", "velocity", "latents", "sample"):
            named[name] = torch.randn(shape)
        elif name == "sigmas":
            named[name] = torch.linspace(1, 0, 9)
        elif name == "index":
            named[name] = 2
        elif name == "timestep":
            times = named["self"].timesteps
            single = function.__name__.startswith("ddim") or "return_dict" in parameters
            # Whole numbers are indices to schedulers of their own class.
            times = times if owner is None else times.float()
            named[name] = times[2] if single else times[2:3]
        elif name in ("eta", "noise_level") and parameter.default is parameter.empty:
            named[name] = 0.3
        elif parameter.default is parameter.empty:
            named[name] = None if name == "prev_sample" else True
    if function.__name__.startswith("ddim"):
        named["eta"] = 1.0
    return named


def run_one(program: list[str], root: Path) -> dict[str, Any]:
    """Runs a script, or `-m` and a module, with `--help` under `run`; then calls what it has of known functions."""
    import diffusers

    from dancegrpo_fast.cli import run as command
    from dancegrpo_fast.dropin.source import HOOK

    # It asks what is installed while it is imported, and must not find what is made up below.
    importlib.import_module("diffusers.pipelines.flux.pipeline_flux")
    absent = _AbsentModules(root)
    sys.meta_path.append(absent)
    # Where older scripts look for it.
    diffusers.utils.randn_tensor = diffusers.utils.torch_utils.randn_tensor
    ended = "ran to its end"
    execute = command.main([*program, "--help"])
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            execute()
        except SystemExit as error:
            ended = f"exit {error.code}"
        except BaseException as error:
            ended = f"{type(error).__name__}: {str(error)[:160]}"
    replacements = getattr(builtins, HOOK).__self__.replacements
    functions = []
    for definition in list(replacements.definitions):
        home = sys.modules.get(definition.function.__module__)
        owner = None if definition.owner is None else getattr(home, definition.owner, None)
        stand_in = replacements.stand_in(definition.function, definition.owner, definition.where)
        called = "called"
        try:
            stand_in(**arguments(stand_in, owner))
        except Exception as error:
            called = f"{type(error).__name__}: {str(error)[:160]}"
        path, _, line = definition.where.rpartition(":")
        place = f"{Path(path).resolve().relative_to(root)}:{line}"
        taken = [known.target for known in definition.dispatch.taken] if definition.dispatch else []
        functions.append({"place": place, "name": definition.label, "taken": taken, "called": called})
    refused = [text.replace(f"{root}/", "") for text in replacements.refused]
    return {"ended": ended, "functions": functions, "refused": refused, "absent": sorted(absent.made)}


def scripts_of(root: Path) -> list[Path]:
    """Files with a `__main__` guard, except tests and documentation."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = {part.lower() for part in path.relative_to(root).parts}
        if not parts & {"test", "tests", "doc", "docs", ".git"} and _GUARD.search(path.read_text(errors="replace")):
            found.append(path)
    return found


def _defines(path: Path) -> bool:
    try:
        return any(True for _ in definitions(ast.parse(path.read_bytes()).body))
    except (SyntaxError, ValueError):
        return False


def state_of(root: Path) -> str:
    """The commit of a checkout and its day."""
    command = ["git", "-C", str(root), "log", "-1", "--format=%h, %ad", "--date=short"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _process(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    search = os.pathsep.join([str(root), str(root / "src"), str(_HERE), os.environ.get("PYTHONPATH", "")])
    # In a folder of their own, since some write logs where they are started.
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"cwd": folder, "env": os.environ | {"PYTHONPATH": search}}
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, **options)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"longer than {_SECONDS} s")


def _run(root: Path, *program: str) -> dict[str, Any]:
    ran = _process(root, "-m", "bench.projects", str(root), "--one", *program)
    lines = ran.stdout.strip().splitlines()
    whole = ran.returncode == 0 and lines and lines[-1].startswith("{")
    found: dict[str, Any] = json.loads(lines[-1]) if whole else {"crash": ran.stderr[-400:]}
    return found


# Above the table, so that the page says how it was made.
_HEAD = """# What `run` does with the scripts of other projects

Made by `python -m bench.projects CHECKOUT ...`. Scripts are files with a `__main__` guard, and files with a known
function that none of those imports (`-m`). Each is looked through; those with a candidate are run with `--help`, where
modules that are not installed are empty stand-ins. Then every known function that was defined is called once on small
tensors.
"""


def look(root: Path) -> list[dict[str, Any]]:
    """A row for every script of a project, and for every file with a known function that none of them imports."""
    rows = []
    for script in scripts_of(root):
        dry = _process(root, "-m", "dancegrpo_fast.cli", "run", "--dry-run", str(script))
        row: dict[str, Any] = {"script": str(script.relative_to(root)), "dry_run": dry.stdout.replace(f"{root}/", "")}
        if dry.returncode != 0:
            row["crash"] = dry.stderr[-400:]
        elif "tried at its first call" in dry.stdout:
            row |= _run(root, str(script))
        rows.append(row)
    met = set[str]()
    for path in sorted(root.rglob("*.py")):
        met |= {function["place"].partition(":")[0] for row in rows for function in row.get("functions", [])}
        name = str(path.relative_to(root))
        if name not in met and ".git" not in path.parts and _defines(path):
            module = name.removesuffix(".py").removeprefix("src/").replace("/", ".")
            rows.append({"script": f"-m {module}", **_run(root, "-m", module)})
    return rows


def table(projects: dict[str, dict[str, Any]]) -> str:
    """What was found, as Markdown."""
    titles = ("project", "scripts", "with a known function", "all replaced", "some refused", "crashed")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    details = []
    for name, project in projects.items():
        rows = project["rows"]
        found = [row for row in rows if row.get("functions")]
        whole = [row for row in found if all(f["taken"] for f in row["functions"])]
        refused = [row for row in found if row.get("refused")]
        crashed = [row for row in rows if "crash" in row]
        counts = (len(rows), len(found), len(whole), len(refused), len(crashed))
        lines.append(f"| {name} ({project['state']}) | {' | '.join(map(str, counts))} |")
        for row in found:
            for function in row["functions"]:
                by = ", ".join(t.removeprefix("dancegrpo_fast.compat.") for t in function["taken"]) or "the original"
                called = "" if function["called"] == "called" else f"; {function['called']}"
                place = f"`{function['name']}`, {function['place']}"
                details.append(f"| {name} | `{row['script']}` | {place} | {by}{called} |")
            for text in row.get("refused", []):
                details.append(f"| {name} | `{row['script']}` | | {text} |")
    # A module that is run by name may be imported by its package, too.
    details = list(dict.fromkeys(details))
    return "\n".join([*lines, "", "| project | script | function | what stands in |", "|" + "---|" * 4, *details])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.projects", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="checkouts of projects")
    parser.add_argument("--output", type=Path, default=Path("bench/results/drop-in-projects.md"))
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run_one(given.one, given.folders[0].resolve())))
        return
    projects: dict[str, dict[str, Any]] = {}
    for folder in given.folders:
        projects[folder.name] = {"state": state_of(folder), "rows": look(folder.resolve())}
        print(f"{folder.name}: {len(projects[folder.name]['rows'])} scripts", file=sys.stderr)
    given.output.write_text(f"{_HEAD}\n{table(projects)}\n")
    given.output.with_suffix(".json").write_text(f"{json.dumps(projects, indent=1)}\n")
    print(given.output.read_text())


if __name__ == "__main__":
    main()
