"""Lines and bars of what a run goes through, for a person at a terminal."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")


def counted(items: Sequence[_T], what: str) -> Iterable[_T]:
    """`items` themselves; where standard error is a terminal, in the first process, with a bar that leaves no trace."""
    # Not above: `say` is for commands that need no torch.
    import torch.distributed as dist

    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if not (first and sys.stderr.isatty()):
        return items
    from tqdm import tqdm

    bar: Iterable[_T] = tqdm(items, desc=what, leave=False, dynamic_ncols=True)
    return bar


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Inside, a line on a terminal's standard error says what is being done; it leaves no trace."""
    if not sys.stderr.isatty():
        yield
        return
    line = text[: shutil.get_terminal_size().columns - 1]
    sys.stderr.write(f"\r\x1b[K{line}")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def say(text: str, *, error: bool = False) -> None:
    """Prints a line at once; where nobody reads any more, as after the end of a pipe, nothing happens."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        # What the stream still holds is tried again when Python ends, which then has another exit status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
