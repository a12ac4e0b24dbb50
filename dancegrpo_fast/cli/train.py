"""`dancegrpo-fast train`: runs a recipe to its end and draws it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ._recipe import load


def main(arguments: Sequence[str]) -> int:
    """Trains; after an error of the disk, or a signal, says what is left and how the run goes on."""
    recipe, options = load(arguments, resume=None, accept_changes=None)
    from ..files import writing
    from ..progress import say
    from ..run.pictures import draw
    from ..run.words import closing_line
    from ..stopping import Stopped
    from ..train import Trainer

    trainer = Trainer(recipe, options["resume"], options["accept_changes"])
    root = trainer.directory.root
    try:
        trainer.run()
        if not trainer.processes.is_main:
            return 0
        if recipe.evaluation is not None and not trainer.finished:
            with writing(root):
                pictures, refused = draw(root)
            for picture in pictures:
                say(f"drew {picture}")
            if refused is not None:
                say(f"no picture of samples: {refused}")
    except Stopped as stopped:
        if trainer.processes.is_main:
            left = _left(trainer.directory.newest(), arguments, options["resume"])
            say(f"dancegrpo-fast train: stopped by {stopped.name}; {left}", error=True)
        return stopped.status
    except OSError as error:
        raise OSError(f"{error}; {_left(trainer.directory.newest(), arguments, options['resume'])}") from error
    say(closing_line(root, recipe.name))
    return 0


def _left(newest: Path | None, arguments: Sequence[str], resume: str | None) -> str:
    """What is left of a run that ended early, and how it goes on."""
    whole = "no checkpoint had been written, begin again" if newest is None else f"{newest} is whole, go on"
    more = [] if resume == "auto" else ["--resume", "auto"]
    return f"{whole} with: {shlex.join(['dancegrpo-fast', 'train', *arguments, *more])}"
