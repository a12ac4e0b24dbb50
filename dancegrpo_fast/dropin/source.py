"""Where source text and code objects define functions with known names. Needs no torch."""

import ast
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from .known import KNOWN, candidates

# Not mangled in a class, as it ends with underscores.
HOOK = "__dancegrpo_fast_define__"
_FUNCTIONS = {known.name for known in KNOWN if known.owner is None}
METHODS = {known.owner: {k.name for k in KNOWN if k.owner == known.owner} for known in KNOWN if known.owner}
_NAMES = _FUNCTIONS | METHODS.keys()


def defines(code: CodeType) -> bool:
    """Whether a module's code may define a known function; reads no source."""
    # Most modules end here; what a module defines is among its names.
    return not _NAMES.isdisjoint(code.co_names) and any(
        inner.co_name in _FUNCTIONS
        or any(method.co_name in METHODS[inner.co_name] for method in _inner(inner) if inner.co_name in METHODS)
        for inner in _inner(code)
    )


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            # Since Python 3.12 type parameters have a scope of their own.
            generic = constant.co_name.startswith("<generic parameters of ")
            yield from _inner(constant) if generic else (constant,)


def definitions(body: Iterable[ast.AST], owner: str | None = None) -> Iterator[tuple[str | None, ast.FunctionDef]]:
    """Known functions of a module and methods of its classes, under conditions too, but none inside of a function."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            if candidates(node.name, owner):
                yield owner, node
        elif isinstance(node, ast.ClassDef):
            if owner is None:
                yield from definitions(node.body, node.name)
        elif isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case)) and not isinstance(
            node, ast.AsyncFunctionDef
        ):
            yield from definitions(ast.iter_child_nodes(node), owner)


def hooked(source: str | bytes, path: str) -> ast.Module:
    """The syntax tree in which every known function goes through the hook as it is defined; lines and names stay.

    Raises:
        SyntaxError: of the source.
        ValueError: it holds null bytes.
    """
    tree: ast.Module = compile(source, path, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)  # type: ignore[assignment]  # by its flag
    for _, node in definitions(tree.body):
        at = {"lineno": node.lineno, "col_offset": 0, "end_lineno": node.lineno, "end_col_offset": 0}
        # Innermost: the script's own decorators go around ours.
        node.decorator_list.append(ast.Name(HOOK, ast.Load(), **at))
    return tree


def parameters(node: ast.FunctionDef) -> tuple[inspect.Parameter, ...]:
    """The written signature; a default that is no literal is its text."""
    args, kinds = node.args, inspect.Parameter
    plain = [
        *((a, kinds.POSITIONAL_ONLY) for a in args.posonlyargs),
        *((a, kinds.POSITIONAL_OR_KEYWORD) for a in args.args),
    ]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults))
    found = [_parameter(a, kind, d) for (a, kind), d in zip(plain, [*missing, *args.defaults], strict=True)]
    if args.vararg is not None:
        found.append(_parameter(args.vararg, kinds.VAR_POSITIONAL, None))
    found += [_parameter(a, kinds.KEYWORD_ONLY, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg is not None:
        found.append(_parameter(args.kwarg, kinds.VAR_KEYWORD, None))
    return tuple(found)


def _parameter(arg: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    value: Any = inspect.Parameter.empty
    if default is not None:
        try:
            value = ast.literal_eval(default)
        except ValueError:
            value = ast.unparse(default)
    return inspect.Parameter(arg.arg, kind, default=value)
