"""What `dancegrpo-fast run` was asked for, and how it speaks. Needs no torch; settings travel to child processes."""

import contextlib
import os
import sys
import threading
from dataclasses import dataclass
from multiprocessing import process

ROUNDINGS = ("exact", "reference")
# As in `backends`, which needs torch.
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
LATENTS = ("bfloat16", "float16", "float32")
# Set in a thread that runs a script's function on the side: what it calls itself is neither tried nor counted.
inside = threading.local()


@dataclass(frozen=True)
class Settings:
    """Options of `run`; `only` and `skip` are names as the report has them, `None` leaves a thing alone."""

    rounding: str = "exact"
    backend: str = "auto"
    latents: str | None = None
    accelerate: str | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    report: str | None = None


def rank() -> int:
    """This process's number in a distributed run, from 0."""
    return int(os.environ.get("RANK") or 0)


def ranks() -> int:
    """How many processes a distributed run has."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def say(text: str) -> None:
    """Tells the user of `run` something; of the processes of a distributed run the first one speaks."""
    child = "" if process.parent_process() is None else f" [{process.current_process().name}]"
    # What a script has put there, or closed, must not end it.
    with contextlib.suppress(Exception):
        # `print` would take stdout where there is no stderr.
        if rank() == 0 and sys.stderr is not None:
            print(f"dancegrpo-fast run{child}: {text}", file=sys.stderr, flush=True)
