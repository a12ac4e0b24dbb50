"""`dancegrpo-fast run`: Python, with the step functions of known projects replaced where they are defined."""

import builtins
import importlib.machinery
import os
import runpy
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ..dropin.known import KNOWN
from ..dropin.launchers import launches, with_run
from ..dropin.loading import MODES
from ..dropin.settings import BACKENDS, LATENTS, ROUNDINGS, Settings
from ..dropin.source import hooked

USAGE = """usage: dancegrpo-fast run [options] SCRIPT.py [--] [ARGUMENTS]
       dancegrpo-fast run [options] -m MODULE [ARGUMENTS]
       torchrun [its options] -m dancegrpo_fast.cli run [options] SCRIPT.py [ARGUMENTS]
       accelerate launch [its options] -m dancegrpo_fast.cli run [options] SCRIPT.py [ARGUMENTS]

Runs a training script as `python` does (a folder or zip file with a __main__.py, too), with the step functions of known
projects replaced by this library's. A function is known by its name. At its first call ours is tried beside it, and
takes its place where it computes the same. What was replaced, what was not and why, is said. A table closes the run.
Processes that multiprocessing starts get the same. Spawned ones report for themselves; forked ones are not counted.

options:
  --rounding exact|reference   of ours: exact arithmetic, or the roundings of the published code (exact)
  --backend NAME               of ours: {backends} (auto)
  --latents DTYPE              {latents}, to which a script casts its latents after each step:
                               they are rounded to it before they are scored, so that the first ratio is 1
  --accelerate lossless|fast   transformers that are loaded through diffusers get this library's block ops; without a
                               CUDA device only as lossless:cpu or fast:cpu, since there they cost time
  --only NAME, --skip NAME     replace these alone, or all but these; more names after commas, or by repeating
  --report FILE                writes the closing table as JSON
  --dry-run                    runs nothing: lists the known functions in the script's own files
  --help                       this text

names, as NAME or package.module:NAME:
{names}
"""
_CHOICES = {"rounding": ROUNDINGS, "backend": BACKENDS, "latents": LATENTS, "accelerate": MODES}
_VALUES = (*_CHOICES, "only", "skip", "report")


def main(arguments: Sequence[str]) -> Callable[[], None]:
    """Reads a command line, and returns what does it.

    Args:
        arguments: `[options] script.py [--] [the script's own]` or `[options] -m module [the module's own]`.

    Raises:
        ValueError: bad arguments; or a launcher, whose processes would not be replaced.
    """
    rest, given, flags = list(arguments), dict[str, list[str]](), set[str]()
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-"):
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("-h", "--help", "--dry-run"):
            flags.add(word)
        elif word.startswith("--") and name in _VALUES:
            if not equals and not rest:
                raise ValueError(f"--{name}: got nothing, want a value")
            given.setdefault(name, []).append(value if equals else rest.pop(0))
        else:
            wanted = ", ".join(f"--{option}" for option in (*_VALUES, "dry-run", "help"))
            raise ValueError(f"{word}: want one of {wanted} before the script")
    if flags & {"-h", "--help"}:
        return lambda: print(usage(), end="")
    settings = _settings(given)
    if not rest or rest == ["-m"]:
        raise ValueError("script: got none, want a Python file, or -m and a module")
    if launches(rest):
        module = rest[0] == "-m"
        raise ValueError(
            f"{' '.join(rest[: 1 + module])}: got a launcher, whose processes would not be replaced; "
            f"want: {'python ' * module}{with_run(rest)}"
        )
    run = _module(rest[1], rest[2:]) if rest[0] == "-m" else _path(rest[0], rest[1:])
    if "--dry-run" in flags:
        return _dry_run(rest, settings)
    return lambda: _run(run, settings)


def _dry_run(program: Sequence[str], settings: Settings) -> Callable[[], None]:
    from ..dropin.scan import listed

    script = Path(program[0])
    if program[0] == "-m":
        text = listed(program[1], settings, [os.getcwd(), *sys.path[1:]])
    else:
        text = listed(script, settings, [str(script if script.is_dir() else script.resolve().parent), *sys.path[1:]])
    return lambda: print(text)


def usage() -> str:
    """What `--help` prints."""
    return USAGE.format(backends="|".join(BACKENDS), latents="|".join(LATENTS), names=_names())


def _labels() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for known in KNOWN:
        found.setdefault(known.name if known.owner is None else f"{known.owner}.{known.name}", []).append(known.about)
    return found


def _names() -> str:
    return "\n".join(f"  {name}  ({'; '.join(dict.fromkeys(about))})" for name, about in _labels().items())


def _settings(given: dict[str, list[str]]) -> Settings:
    fields: dict[str, Any] = {name: values[-1] for name, values in given.items()}
    for name, allowed in _CHOICES.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(f'--{name}: got "{fields[name]}", want one of {list(allowed)}')
    for name in ("only", "skip"):
        fields[name] = tuple(part for value in given.get(name, []) for part in value.split(",") if part)
        for wanted in fields[name]:
            if wanted.rpartition(":")[2] not in _labels():
                raise ValueError(f'--{name}: got "{wanted}", want NAME or package.module:NAME of\n{_names()}')
        if name in given and not fields[name]:
            raise ValueError(f'--{name}: got "{",".join(given[name])}", want a name')
    if "report" in fields:
        # The script may go elsewhere.
        fields["report"] = os.path.abspath(fields["report"])
        folder = os.path.dirname(fields["report"])
        why = "whose folder does not exist" if not os.path.isdir(folder) else ""
        # Told now, not after days of training.
        if not why and os.path.isdir(fields["report"]):
            why = "a folder"
        if not why and not os.access(folder, os.W_OK):
            why = "in a folder where you may not write"
        if why:
            raise ValueError(f"--report: got {given['report'][-1]}, {why}; want a file to write")
    return Settings(**fields)


def _path(script: str, own: Sequence[str]) -> Callable[[], None]:
    """What `python script own...` does."""
    path = Path(script)
    if not path.exists():
        raise ValueError(f"script: got {script}, which does not exist; want a Python file")
    program = path.is_dir() or (path.is_file() and zipfile.is_zipfile(path))
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise ValueError(f"script: got {script}, a folder without __main__.py; want a Python file")
    if path.suffix == ".pyc":
        raise ValueError(f"script: got {script}, which is compiled; want its source")
    own = own[1:] if own[:1] == ["--"] else own

    def run() -> None:
        sys.argv = [script, *own]
        # The real folder of a file, as Python has it.
        if program:
            _first_on_path(os.path.abspath(path), sys.flags.safe_path)
            _run_as_main("__main__", False)
            return
        _first_on_path(str(path.resolve().parent))
        file = os.path.join(os.getcwd(), script)
        main = sys.modules["__main__"]
        loader = importlib.machinery.SourceFileLoader("__main__", file)
        main.__dict__.update(__file__=file, __cached__=None, __loader__=loader)
        exec(compile(hooked(path.read_bytes(), file), file, "exec", dont_inherit=True), main.__dict__)

    return run


def _module(name: str, own: Sequence[str]) -> Callable[[], None]:
    """What `python -m name own...` does."""

    def run() -> None:
        sys.argv = ["-m", *own]
        _first_on_path(os.getcwd())
        _run_as_main(name, True)

    return run


def _run_as_main(name: str, alter_argv: bool) -> None:
    as_python: Any = runpy
    as_python._run_module_as_main(name, alter_argv)


def _first_on_path(folder: str, beside: bool = False) -> None:
    if beside:
        sys.path.insert(0, folder)
    elif not sys.flags.safe_path:  # else the first is one of the user's
        sys.path[0] = folder


def _run(run: Callable[[], None], settings: Settings) -> None:
    from ..dropin.process import begin

    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    begin(settings)
    try:
        run()
    except SystemExit:
        raise
    except BaseException as error:
        _without_our_frames(error)
        raise


def _without_our_frames(error: BaseException) -> None:
    """Has Python print the script's part of the traceback alone, by whichever hook the script left."""
    hook, folder, own = sys.excepthook, os.path.join(Path(__file__).parents[1], ""), error.__traceback__
    while own is not None and own.tb_frame.f_code.co_filename.startswith(folder):
        own = own.tb_next

    def excepthook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        # By now it holds the frames of whoever called us, too.
        if value is error:
            value, trace = value.with_traceback(own), own
        hook(kind, value, trace)

    sys.excepthook = excepthook
