"""The command `dancegrpo-fast`, one file a command; each is loaded when it is called, and nothing else imports them."""

import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..progress import say
from ..stopping import Stop, Stopped

USAGE = """usage: dancegrpo-fast train RECIPE.yaml [--resume auto|CHECKPOINT] [--accept-changes all|FIELD,FIELD]
                            [--train.iterations 10 ...]
       dancegrpo-fast evaluate RECIPE.yaml --output FOLDER [--checkpoint RUN|CHECKPOINT|MODEL] [--samplers ode,sde]
                               [--by COLUMN] [--weights model|ema] [--evaluation.prompts FILE ...]
       dancegrpo-fast run [--accelerate lossless|fast] [--latents DTYPE] [--dry-run ...] SCRIPT.py [ARGUMENTS]
       dancegrpo-fast memory MODEL|RECIPE.yaml [--frames 53 --height 480 --width 640 --lora 32 --gpu 80 ...]
                             [--json FILE] [--figures FOLDER]
       dancegrpo-fast rates [--device cuda:0] [--seconds 20]
       dancegrpo-fast profile RECIPE.yaml [--iterations 1] [--figures FOLDER] [--train.micro_batch 4 ...]
       dancegrpo-fast recipes [copy NAME [FOLDER]]
       dancegrpo-fast info
       dancegrpo-fast --version

`train` runs a recipe; every field of it can be overridden.
`evaluate` samples the recipe's evaluation prompts and writes pictures, scores.jsonl and a table.
`run` executes a published training script with its step functions replaced by this library's, and says which.
`memory` predicts every phase of an iteration without a GPU; it exits with 0 if the GPU holds it, 1 if not, 2 for bad
input. With --figures it makes many plans: a minute or more.
`rates` measures what the device at hand does in a second, and keeps it for plans on this machine.
`profile` measures iterations of a recipe beside what was predicted, and draws them; the run's folder stays as it is.
`recipes` lists the recipes that the package brings, and copies one with its prompts.
`info` says what is installed, and which backends can run.
`dancegrpo-fast COMMAND --help` lists a command's settings.
"""
# What a command cannot go without; None where it can, or says it itself.
COMMANDS = {
    "train": "RECIPE.yaml",
    "evaluate": "RECIPE.yaml --output FOLDER",
    "run": None,
    "memory": "MODEL or RECIPE.yaml",
    "rates": None,
    "profile": "RECIPE.yaml",
    "recipes": None,
    "info": None,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if given == ["--version"]:
        print(f"dancegrpo_fast {__version__}")
        return 0
    if not given or given[0] not in COMMANDS:
        print(USAGE, end="", file=sys.stderr)
        if given:
            print(f'\ncommand: got "{given[0]}", want one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    command, *rest = given
    if not rest and COMMANDS[command] is not None:
        print(f"dancegrpo-fast {command}: got nothing, want {COMMANDS[command]}; --help says more", file=sys.stderr)
        return 2
    try:
        with Stop(at_once=True), _own_warnings():
            done = importlib.import_module(f".{command}", __name__).main(rest)
    except ImportError as error:
        from ..install import missing

        say(f"dancegrpo-fast {command}: {missing(error)}", error=True)
        return 1
    except (Stopped, KeyboardInterrupt) as stopped:
        # Ctrl-C for the second time has no number of its own.
        ended = stopped if isinstance(stopped, Stopped) else Stopped(signal.SIGINT)
        say(f"dancegrpo-fast {command}: stopped by {ended.name}", error=True)
        return ended.status
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            # Of a reward, whose author needs the place.
            traceback.print_exception(error.__cause__)
        say(f"dancegrpo-fast {command}: {error}", error=True)
        return 1
    if callable(done):
        # A script, out here, where its exceptions and its exit status are its own.
        done()
        return 0
    return done or 0


@contextmanager
def _own_warnings() -> Iterator[None]:
    """This package's warnings as lines for users; those of others say where they come from."""
    formatted, here = warnings.formatwarning, os.path.dirname(os.path.dirname(__file__))

    def said(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = category is UserWarning and filename.startswith(here)
        return f"warning: {message}\n" if ours else formatted(message, category, filename, lineno, line)

    warnings.formatwarning = said
    try:
        yield
    finally:
        warnings.formatwarning = formatted
