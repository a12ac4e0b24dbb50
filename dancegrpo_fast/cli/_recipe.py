"""What the commands that run a recipe share."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from ..recipe import Recipe, load_recipe


def load(arguments: Sequence[str], command: str = "train", **options: str | None) -> tuple[Recipe, Any]:
    """`load_recipe`; then modules beside the recipe and in the working folder can be imported, as rewards may be there.

    They come last, so that none stands in for an installed module of its name.
    """
    for folder in (os.path.dirname(os.path.abspath(arguments[0])), os.getcwd()):
        if folder not in sys.path:
            sys.path.append(folder)
    return load_recipe(arguments, command, **options)
