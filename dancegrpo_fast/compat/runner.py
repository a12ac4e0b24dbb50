"""`dancegrpo-fast run script.py`: runs a script as it is, with its step functions replaced where they are defined."""

import ast
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from .. import backends
from ._patch import Known, Signature, bound, recognise, signature, sought

# A script's own files; none comes near it, and a scan that runs away stops.
_MAX_FILES = 5000
_HOOK = "__dancegrpo_fast_replace__"


@dataclass(frozen=True)
class Definition:
    """A recognised function in a source file."""

    path: Path
    line: int
    name: str
    known: Known


def prepare(arguments: Sequence[str]) -> Callable[[], None]:
    """Looks through a script and what it imports, says what will be replaced, and returns what runs it.

    Args:
        arguments: `[--rounding ...] [--backend ...] script.py [--] [the script's own]`.

    Raises:
        ValueError: bad arguments, nothing to replace, or a known name with an unknown signature.
    """
    rest = list(arguments)
    settings = {"rounding": "exact", "backend": "auto"}
    while rest and rest[0].startswith("--"):
        name, equals, value = rest.pop(0)[2:].partition("=")
        if name not in settings:
            raise ValueError(f"--{name}: want --rounding or --backend before the script")
        if not equals:
            value = rest.pop(0) if rest else ""
        allowed = ("exact", "reference") if name == "rounding" else backends.NAMES
        if value not in allowed:
            raise ValueError(f'--{name}: got "{value}", want one of {list(allowed)}')
        settings[name] = value
    if not rest:
        raise ValueError("script: got none, want a Python file")
    script, own = Path(rest[0]), rest[1:]
    if not script.is_file():
        raise ValueError(f"script: got {script}, which does not exist; want a Python file")
    own = own[1:] if own[:1] == ["--"] else own
    folder = str(script.resolve().parent)
    definitions = scan(script, [folder, *sys.path[1:]])
    if not definitions:
        raise ValueError(f"{script}: neither it nor what it imports defines one of these functions:\n{sought()}")
    for found in definitions:
        print(f"dancegrpo-fast run: {found.path}:{found.line} {found.name} -> {found.known.target}", file=sys.stderr)

    def replace(function: Any) -> Any:
        owner, _, name = function.__qualname__.rpartition(".")
        known = recognise(name, owner or None, signature(function), function.__qualname__)
        return function if known is None else bound(known, function, settings["rounding"], settings["backend"])

    def run() -> None:
        sys.argv = [str(script), *own]
        sys.path[0] = folder
        sys.meta_path.insert(0, _Finder({found.path for found in definitions}, replace))
        main = ModuleType("__main__")
        main.__dict__.update(__file__=str(script.absolute()), __builtins__=__builtins__, **{_HOOK: replace})
        sys.modules["__main__"] = main
        exec(_compiled(script.read_bytes(), str(script.absolute())), main.__dict__)

    return run


def scan(script: Path, search: Sequence[str]) -> list[Definition]:
    """Recognised definitions in a script and in the files that it imports.

    The imports of files outside of `site-packages` are followed; of an installed package only what they name is
    looked at, and nothing of the standard library.

    Raises:
        ValueError: a known name with an unknown signature, or a script with a syntax error.
    """
    queue: list[tuple[Path, str]] = [(script.resolve(), "__main__")]
    seen: set[Path] = set()
    found: list[Definition] = []
    while queue and len(seen) < _MAX_FILES:
        path, name = queue.pop(0)
        if path in seen:
            continue
        seen.add(path)
        try:
            tree = ast.parse(path.read_bytes(), str(path))
        except SyntaxError as error:
            if path == script.resolve():
                raise ValueError(f"{path}: {error}") from error
            continue  # it may never be imported
        for owner, node in _functions(tree.body):
            known = recognise(node.name, owner, _written_signature(node), f"{path}:{node.lineno}")
            if known is not None:
                label = node.name if owner is None else f"{owner}.{node.name}"
                found.append(Definition(path, node.lineno, label, known))
        if not {"site-packages", "dist-packages"} & set(path.parts):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for wanted in _imports(tree, package):
                queue += _locate(wanted, search)
    return found


def _functions(body: Sequence[ast.stmt], owner: str | None = None) -> Iterator[tuple[str | None, ast.FunctionDef]]:
    """Functions of a module and methods of its classes, under conditions too, but none inside of a function."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield owner, node
        elif isinstance(node, ast.ClassDef) and owner is None:
            yield from _functions(node.body, node.name)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _functions(getattr(node, part, []), owner)
            for handler in getattr(node, "handlers", []):
                yield from _functions(handler.body, owner)


def _written_signature(node: ast.FunctionDef) -> Signature:
    args = node.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    defaults: list[Any] = [inspect.Parameter.empty] * (len(names) - len(args.defaults))
    defaults += [_literal(d) for d in args.defaults]
    pairs = list(zip(names, defaults, strict=True))
    for only, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        pairs.append((only.arg, inspect.Parameter.empty if default is None else _literal(default)))
    for star in (args.vararg, args.kwarg):
        if star is not None:
            pairs.append((star.arg, inspect.Parameter.empty))
    return tuple(pairs)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a file may import, functions' own imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _locate(name: str, search: Sequence[str]) -> list[tuple[Path, str]]:
    """Source files that importing `name` runs, found without running any: its packages' and its own."""
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names or parts[0] == (__package__ or "").partition(".")[0]:
        return []
    files: list[tuple[Path, str]] = []
    path: Sequence[str] = search
    for depth in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), list(path))
        if spec is None:
            break
        if spec.origin is not None and spec.origin.endswith(".py"):
            files.append((Path(spec.origin).resolve(), spec.name))
        if spec.submodule_search_locations is None:
            break
        path = list(spec.submodule_search_locations)
    return files


def _compiled(source: bytes, path: str) -> CodeType:
    """Code that hands every recognised function to the hook as it is defined; lines and names stay."""
    tree = ast.parse(source, path)
    for owner, node in _functions(tree.body):
        if recognise(node.name, owner, _written_signature(node), path) is not None:
            at = {"lineno": node.lineno, "col_offset": 0, "end_lineno": node.lineno, "end_col_offset": 0}
            # Innermost: the script's own decorators go around ours.
            node.decorator_list.append(ast.Name(_HOOK, ast.Load(), **at))
    return compile(tree, path, "exec", dont_inherit=True)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a source file with the hook; never from or into `__pycache__`."""

    def __init__(self, fullname: str, path: str, replace: Callable[[Any], Any]) -> None:
        super().__init__(fullname, path)
        self._replace = replace

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return _compiled(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[_HOOK] = self._replace
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Gives the files in which something was recognised to `_Loader`."""

    def __init__(self, paths: set[Path], replace: Callable[[Any], Any]) -> None:
        self._paths = paths
        self._stems = {p.parent.name if p.name == "__init__.py" else p.stem for p in paths}
        self._replace = replace

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.rpartition(".")[2] not in self._stems:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None or Path(spec.origin).resolve() not in self._paths:
            return None
        spec.loader = _Loader(fullname, spec.origin, self._replace)
        return spec
