"""`dancegrpo-fast info`, as `python -m dancegrpo_fast.info`: what is installed."""

from argparse import ArgumentParser
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Prints versions, backends, and why one is unavailable."""
    ArgumentParser(prog="dancegrpo-fast info", description=main.__doc__).parse_args(arguments)
    from ..info import main as info

    info()
