"""`dancegrpo-fast train`: runs a recipe to its end and draws it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ._recipe import load


def main(arguments: Sequence[str]) -> None:
    """Trains; an error of the disk says what is left and how the run goes on."""
    recipe, options = load(arguments, resume=None, accept_changes=None)
    from ..files import writing
    from ..run.pictures import draw
    from ..run.words import closing_line
    from ..train import Trainer

    trainer = Trainer(recipe, options["resume"], options["accept_changes"])
    root = trainer.directory.root
    try:
        trainer.run()
        if not trainer.processes.is_main:
            return
        if recipe.evaluation is not None and not trainer.finished:
            with writing(root):
                pictures, refused = draw(root)
            for picture in pictures:
                print(f"drew {picture}")
            if refused is not None:
                print(f"no picture of samples: {refused}")
    except OSError as error:
        raise OSError(f"{error}; {_left(trainer.directory.newest(), arguments, options['resume'])}") from error
    print(closing_line(root, recipe.name))


def _left(newest: Path | None, arguments: Sequence[str], resume: str | None) -> str:
    """What is left of a run that ended early, and how it goes on."""
    if newest is None:
        return "no checkpoint had been written"
    more = [] if resume == "auto" else ["--resume", "auto"]
    return f"{newest} is whole, go on with: {shlex.join(['dancegrpo-fast', 'train', *arguments, *more])}"
