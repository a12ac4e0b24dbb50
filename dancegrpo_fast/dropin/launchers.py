"""Programs that start training scripts, and the order of words by which their processes are replaced."""

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath

RUN = ("-m", "dancegrpo_fast.cli", "run")
_PROGRAMS = ("torchrun", "accelerate", "accelerate-launch", "deepspeed")
_MODULES = (
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "deepspeed.launcher.runner",
)
# Options of the interpreter that take the next word.
_TAKES_ONE = ("-X", "-W", "--check-hash-based-pycs")


def is_python(word: str) -> bool:
    """Whether a program is a Python interpreter, by its name."""
    return re.fullmatch(r"python[\d.]*t?", PurePath(word).name) is not None


def launches(words: Sequence[str]) -> bool:
    """Whether words after `python` name a launcher: `-m module ...`, or the file of a program."""
    if words[:1] == ["-m"]:
        return len(words) > 1 and words[1] in _MODULES
    return bool(words) and PurePath(words[0]).name in _PROGRAMS


def after_options(words: Sequence[str]) -> int:
    """The position of the script, of `-m`, or of `-c` in the words of a Python command line."""
    at = 1
    while at < len(words) and words[at].startswith("-") and words[at] not in ("-m", "-c", "-"):
        at += 2 if words[at] in _TAKES_ONE else 1
    return at


def with_run(words: Sequence[str]) -> str:
    """A launcher's command line in which the script is run by `run`."""
    at = 2 if words[:1] == ["-m"] else 1
    while at < len(words) and not (words[at].endswith(".py") or words[at] in ("-m", "--module")):
        at += 1
    if at >= len(words):
        return f"{shlex.join(words)} {shlex.join(RUN)} SCRIPT.py"
    flag = "--module" if PurePath(words[0]).name == "deepspeed" or "deepspeed.launcher.runner" in words[:2] else "-m"
    script = ["-m" if word == "--module" else word for word in words[at:]]
    return shlex.join([*words[:at], flag, *RUN[1:], *script])
