"""Puts ours in place of the step functions that imported modules hold."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from .known import KNOWN, candidates, misfit
from .replaced import Replacements
from .settings import BACKENDS, ROUNDINGS, Settings


class Replacement(NamedTuple):
    """Where a function was, its name, and the dotted name of what stands there now.

    Where several of ours have its signature, `by` is the first of them; the first call finds which one it is.
    """

    module: str
    function: str
    by: str


def sought() -> str:
    """All functions that are known, one a line, as ours are written."""
    lines: dict[str, None] = {}
    for known in KNOWN:
        owner = "" if known.owner is None else f"{known.owner}."
        lines[f"  {owner}{known.name}{inspect.signature(known.load())}"] = None
    return "\n".join(lines)


def _found_in(module: ModuleType) -> Iterator[tuple[type | None, Callable[..., Any]]]:
    """Functions of a module with known names, and the classes that they are methods of."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) is None or str(value.__module__).startswith(f"{__package__}."):
            continue
        if inspect.isfunction(value) and candidates(value.__name__, None):
            yield None, value
        elif inspect.isclass(value):
            for name in {k.name for k in KNOWN if k.owner == value.__name__} & vars(value).keys():
                yield value, vars(value)[name]


def _target(function: Callable[..., Any], owner: str | None) -> str:
    """Ours for a function, by its signature.

    Raises:
        ValueError: none of ours has it.
    """
    from .dispatch import unfit

    parameters = inspect.signature(function).parameters.values()
    tried = [(known, misfit(known, parameters)) for known in candidates(function.__name__, owner)]
    for known, why in tried:
        if why is None:
            return known.target
    where = f"{function.__module__}.{function.__qualname__}"
    raise ValueError(f"{where}: {unfit(function, [(known, why) for known, why in tried if why is not None])}")


def _silent(text: str) -> None:
    """`patched` says nothing: it returns what it did, and raises."""


@contextmanager
def patched(
    module_or_modules: ModuleType | Iterable[ModuleType], *, rounding: str = "exact", backend: str = "auto"
) -> Iterator[list[Replacement]]:
    r"""Replaces the step functions of known projects, everywhere they were imported to, until the context ends.

    A function is recognised by its name, its signature and, at its first call, by what it does: original and ours are
    called on small CPU tensors, and have to return the same. Every module that holds the function gets ours.
    References elsewhere (in a list, a closure, a `functools.partial`) are not found. Methods of the known schedulers
    are replaced on their class.

        from dancegrpo_fast.compat import patched
        import train_grpo_flux

        with patched(train_grpo_flux) as done:
            print(*done, sep="\n")
            train_grpo_flux.main(arguments)

    Args:
        module_or_modules: where to look.
        rounding: "exact", or "reference" for the roundings of the published code.
        backend: as for `transition_step`.

    Yields:
        What was replaced, one entry for each place.

    Raises:
        ValueError: a bad setting; nothing was recognised; a known name has an unknown signature; or, where the function
            is called, it does something else than ours, with the largest difference.
    """
    from ..checks import check_choice

    check_choice("rounding", rounding, ROUNDINGS)
    check_choice("backend", backend, BACKENDS)
    modules = [module_or_modules] if isinstance(module_or_modules, ModuleType) else list(module_or_modules)
    found = {id(original): (home, original) for m in modules for home, original in _found_in(m)}
    if not found:
        names = ", ".join(m.__name__ for m in modules)
        raise ValueError(f"module_or_modules: got {names} with none of these functions:\n{sought()}")
    replacements = Replacements(Settings(rounding=rounding, backend=backend), _silent, strict=True)
    undo: list[tuple[Any, str, Any]] = []
    done: list[Replacement] = []
    stands: dict[int, tuple[Any, Any]] = {}
    try:
        for home, original in found.values():
            owner = None if home is None else home.__name__
            where = original.__module__
            if inspect.isfunction(original):
                by = _target(original, owner)
            ours = replacements.stand_in(original, owner, where)
            if home is not None:
                undo.append((home, original.__name__, original))
                setattr(home, original.__name__, ours)
                done.append(Replacement(where, f"{home.__qualname__}.{original.__name__}", by))
                continue
            stands[id(ours)] = ours, original
            for module, name in _holders(original, modules):
                undo.append((module, name, original))
                setattr(module, name, ours)
                done.append(Replacement(module.__name__, name, by))
        yield done
    finally:
        for place, name, value in reversed(undo):
            setattr(place, name, value)
        # Modules that were imported within the block took what they found.
        for ours, original in stands.values():
            for module, name in _holders(ours, modules):
                setattr(module, name, original)


def _holders(value: Any, modules: Iterable[ModuleType]) -> list[tuple[ModuleType, str]]:
    """Imported modules and others that hold a value, and under which names."""
    every = {id(m): m for m in (*modules, *list(sys.modules.values()))}.values()
    return [(m, name) for m in every for name, held in list(getattr(m, "__dict__", {}).items()) if held is value]
