"""What `run` does about processes that its script starts. Needs no torch."""

import contextlib
import importlib.machinery
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from multiprocessing import spawn
from pathlib import Path, PurePath
from typing import Any

from .launchers import RUN, after_options, is_python, launches, with_run
from .settings import Settings, say

_INSTALLED = {"site-packages", "dist-packages"}


def follow(settings: Settings) -> None:
    """Processes that `multiprocessing` spawns, or a fork server forks, get the same replacements."""
    original = spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {"dancegrpo_fast": _Passport(settings, name), **original(name)}

    spawn.get_preparation_data = get_preparation_data


class _Passport:
    """Starts the replacements in the process that unpickles it, which it does before it runs the script again."""

    def __init__(self, settings: Settings, name: str) -> None:
        if settings.report is not None:
            path = Path(settings.report)
            # Each process has a report of its own.
            settings = replace(settings, report=str(path.with_name(f"{path.stem}.{name}{path.suffix}")))
        self._settings = settings

    def __reduce__(self) -> tuple[Any, ...]:
        package, _, _ = __name__.partition(".")
        # The parent's own copy; the child may find another one, or none.
        text = (
            "import importlib.util, sys\n"
            f"if {package!r} not in sys.modules:\n"
            f"    spec = importlib.util.spec_from_file_location({package!r}, {sys.modules[package].__file__!r})\n"
            f"    sys.modules[{package!r}] = importlib.util.module_from_spec(spec)\n"
            f"    spec.loader.exec_module(sys.modules[{package!r}])\n"
            f"from {__package__}.process import arrive\n"
            f"arrive({asdict(self._settings)!r})"
        )
        return exec, (text, {})


def tell_of_others() -> None:
    """Says of each other Python process that the script starts which words would have it replaced."""
    told: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
            return
        # Whatever a command line holds, the script's process must start.
        with contextlib.suppress(Exception):
            words = shlex.split(os.fsdecode(arguments[0])) if event == "os.system" else _words(arguments[1])
            hint = _hint(words)
            if hint is not None and hint not in told:
                told.add(hint)
                say(hint)

    sys.addaudithook(hook)


def _words(arguments: Any) -> list[str]:
    words = [os.fsdecode(word) for word in ([arguments] if isinstance(arguments, (str, bytes)) else arguments)]
    if len(words) == 3 and words[1] == "-c" and PurePath(words[0]).name in ("sh", "bash"):
        return shlex.split(words[2])
    return words


def _hint(words: Sequence[str]) -> str | None:
    if words and PurePath(words[0]).name == "raylet":
        return "Ray's workers are processes in which nothing is replaced; dancegrpo_fast.plugins says what to do"
    better = _better(words)
    if better is None:
        return None
    return f"a Python process is started in which nothing is replaced; to have it replaced: {better}"


def _better(words: Sequence[str]) -> str | None:
    """The same command line with `run`; None where it runs no script or module of the user's."""
    if RUN[1] in words or not words:
        return None
    if not is_python(words[0]):
        return with_run(words) if launches(words) else None
    at = after_options(words)
    head, rest = words[:at], words[at:]
    if launches(rest):
        return shlex.join(head) + " " + with_run(rest)
    if not rest or rest[0] in ("-c", "-") or not _is_own(rest):
        return None
    return shlex.join([*head, *RUN, *rest])


def _is_own(rest: Sequence[str]) -> bool:
    if rest[0] != "-m":
        return PurePath(rest[0]).name != "dancegrpo-fast" and not _INSTALLED & set(PurePath(rest[0]).parts)
    top = rest[1].partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top)
    where = "" if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), "")
    return top not in sys.stdlib_module_names and not _INSTALLED & set(PurePath(where).parts)
