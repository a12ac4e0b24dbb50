"""`dancegrpo-fast profile`: measures a recipe's iterations beside what was predicted."""

from collections.abc import Sequence

from ._recipe import load


def main(arguments: Sequence[str]) -> None:
    """Prints the report and, where asked, draws it."""
    recipe, options = load(arguments, "profile", iterations="1", figures=None)
    iterations = options["iterations"] or ""
    if not iterations.isdecimal() or int(iterations) < 1:
        raise ValueError(f"iterations: got {options['iterations']}, want a whole number of at least 1")
    from ..profile import profile_recipe

    report = profile_recipe(recipe, int(iterations))
    print(report.table())
    if options["figures"] is not None:
        for picture in report.figures(options["figures"]):
            print(f"drew {picture}")
