"""`dancegrpo-fast evaluate`: scores a recipe's evaluation prompts with trained or untrained weights."""

from collections.abc import Sequence
from pathlib import Path

from ._recipe import load


def main(arguments: Sequence[str]) -> None:
    """Samples and scores into a folder, and prints the table."""
    defaults = {"output": None, "checkpoint": None, "samplers": None, "by": None, "weights": None}
    recipe, options = load(arguments, "evaluate", **defaults)
    if options["output"] is None:
        raise ValueError("output: got nothing, want a folder for samples and scores")
    from ..evaluate import evaluate

    samplers = None if options["samplers"] is None else options["samplers"].split(",")
    table = evaluate(
        recipe, options["checkpoint"], Path(options["output"]), samplers, options["by"], options["weights"]
    )
    if table is not None:
        print(table)
