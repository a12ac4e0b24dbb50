"""What `run` says while a script runs, and the table at its end."""

import os
import sys

PREFIX = "dancegrpo-fast run: "


def rank() -> int:
    """Which process of a distributed run this is, by the launcher's variables; 0 without one."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0)


def say(text: str) -> None:
    """A line on stderr; of the processes of a distributed run the first one speaks."""
    if rank() == 0:
        print(f"{PREFIX}{text}", file=sys.stderr, flush=True)
