"""`dancegrpo-fast run --dry-run`: the known functions in a script's own files. Runs none, and needs no torch."""

import ast
import functools
import importlib.machinery
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path

from .known import candidates, misfit
from .settings import Settings
from .source import definitions, parameters

_INSTALLED = {"site-packages", "dist-packages"}
_OURS = __name__.partition(".")[0]
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Definition:
    """A function with a known name in a source file."""

    path: Path
    line: int
    module: str
    owner: str | None
    name: str
    parameters: tuple[Parameter, ...]

    @property
    def label(self) -> str:
        """The name in its class."""
        return self.name if self.owner is None else f"{self.owner}.{self.name}"


def listed(program: Path | str, settings: Settings, search: Sequence[str]) -> str:
    """What `--dry-run` prints: candidates with their places, and why others are none.

    Args:
        program: the script, or the dotted name of the module that `-m` was given.
        settings: of them `only` and `skip`.
        search: where modules are looked for first, in order.

    Raises:
        ValueError: the script or module cannot be found or read.
    """
    found, unread = scan(program, search)
    lines = [f"{d.path}:{d.line} {d.label}: {_verdict(d, settings)}" for d in found]
    lines += [f"{path}: not looked at: {reason}" for path, reason in unread]
    if not found:
        lines.append(f"{program}: neither it nor what it imports outside of site-packages defines a known function")
    return "\n".join(lines)


def _verdict(found: Definition, settings: Settings) -> str:
    names = {found.label, f"{found.module}:{found.label}"}
    if settings.only and names.isdisjoint(settings.only):
        return "left alone: not named by --only"
    if not names.isdisjoint(settings.skip):
        return "left alone: named by --skip"
    fitting: dict[str, list[str]] = {}
    reasons: list[str] = []
    for known in candidates(found.name, found.owner):
        reason = misfit(known, found.parameters, _ours(known.ours))
        if reason is None:
            fitting.setdefault(known.target, []).append(known.about)
        else:
            reasons.append(f"as {known.target} it {reason}")
    if fitting:
        tried = (f"{target} ({'; '.join(about)})" for target, about in fitting.items())
        return f"tried at its first call as {', then as '.join(tried)}"
    return f"left alone: {'; '.join(dict.fromkeys(reasons))}"


@functools.cache
def _ours(ours: str) -> tuple[Parameter, ...]:
    """Our own signature as written, so that torch is not imported."""
    module, _, names = ours.partition(":")
    body = _tree(Path(__file__).parents[1] / "compat" / f"{module}.py").body
    for name in names.split("."):
        node = next(n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name)
        body = node.body
    assert isinstance(node, ast.FunctionDef)
    return parameters(node)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


def scan(program: Path | str, search: Sequence[str]) -> tuple[list[Definition], list[tuple[Path, str]]]:
    """Known functions in a program and in what it imports outside of `site-packages`, and files that cannot be read.

    Imports inside of functions are followed, and strings that are dotted names of such modules, as in registries.

    Raises:
        ValueError: the script or module cannot be found or read.
    """
    locate = _locator(search)
    if isinstance(program, Path):
        start = program / "__main__.py" if program.is_dir() else program
        queue = deque([(start.resolve(), "__main__", "")])
    else:
        places = {name: path for path, name in (*locate(program), *locate(f"{program}.__main__"))}
        path = places.get(f"{program}.__main__", places.get(program))
        if path is None:
            raise ValueError(f"-m: got {program}, want a module of the user's own files")
        package = program if f"{program}.__main__" in places else program.rpartition(".")[0]
        queue = deque([(path, "__main__", package), *((p, n, _package(p, n)) for n, p in places.items() if p != path)])
    first, seen = queue[0][0], set[Path]()
    found: list[Definition] = []
    unread: list[tuple[Path, str]] = []
    while queue:
        path, module, package = queue.popleft()
        if path in seen:
            continue
        seen.add(path)
        try:
            tree = _tree(path)
        except (SyntaxError, ValueError, OSError) as error:
            if path == first:
                raise ValueError(f"{path}: {error}") from error
            unread.append((path, str(error)))
            continue
        for owner, node in definitions(tree.body):
            found.append(Definition(path, node.lineno, module, owner, node.name, parameters(node)))
        for wanted in _imports(tree, package):
            queue.extend((p, name, _package(p, name)) for p, name in locate(wanted))
    return found, unread


def _package(path: Path, module: str) -> str:
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a file may import."""
    parents = package.split(".") if package else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
            yield node.value


def _locator(search: Sequence[str]) -> Callable[[str], list[tuple[Path, str]]]:
    """What gives the user's own source files that importing a dotted name runs, found without running any."""

    @functools.cache
    def find(name: str, path: tuple[str, ...] | None) -> importlib.machinery.ModuleSpec | None:
        # By the leaf's name, or Python would want the parent in `sys.modules`; editable installs want the whole name.
        spec = importlib.machinery.PathFinder.find_spec(name.rpartition(".")[2], path or list(search))
        others = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder and hasattr(f, "find_spec")]
        while spec is None and others:
            spec = others.pop(0).find_spec(name, path)
        return spec

    def locate(name: str) -> list[tuple[Path, str]]:
        parts = name.split(".")
        if parts[0] in sys.stdlib_module_names or parts[0] == _OURS:
            return []
        files: list[tuple[Path, str]] = []
        path: tuple[str, ...] | None = None
        for depth in range(1, len(parts) + 1):
            dotted = ".".join(parts[:depth])
            spec = find(dotted, path)
            if spec is None:
                break
            if spec.origin is not None and spec.origin.endswith(".py"):
                file = Path(os.path.abspath(spec.origin))
                if _INSTALLED & set(file.parts):
                    break
                files.append((file, dotted))
            if spec.submodule_search_locations is None:
                break
            path = tuple(spec.submodule_search_locations)
        return files

    return locate
