"""`dancegrpo-fast`: train a recipe, run a script of another project, say what is installed."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import Recipe

USAGE = """usage: dancegrpo-fast train RECIPE.yaml [--resume auto|CHECKPOINT] [--train.iterations 10 ...]
       dancegrpo-fast run [--rounding exact|reference] [--backend NAME] SCRIPT.py [-- ARGUMENTS]
       dancegrpo-fast info

`run` executes a published training script with its step functions replaced by this library's, and says which.
Every field of a recipe can be overridden: `dancegrpo-fast train RECIPE.yaml --help` lists them.
"""


def load_recipe(arguments: Sequence[str]) -> tuple[Recipe, str | None]:
    """A recipe file with overrides, and where to resume from.

    Args:
        arguments: the recipe's path, then `--field.name value` overrides.

    Raises:
        ValueError: a missing file, an unknown field, or a value of the wrong type or range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog="dancegrpo-fast train RECIPE.yaml", exit_on_error=False)
    parser.add_argument("--config", action="config", help="the recipe")
    parser.add_argument("--resume", type=str | None, default=None, help='"auto" or a checkpoint folder')
    parser.add_class_arguments(Recipe, None)
    path = Path(arguments[0])
    if not path.is_file() and arguments[0] not in ("-h", "--help"):
        raise ValueError(f"recipe: got {path}, which does not exist; want a YAML file")
    given = list(arguments) if arguments[0] in ("-h", "--help") else ["--config", str(path), *arguments[1:]]
    try:
        namespace = parser.parse_args(given)
        resume = namespace.pop("resume")
        namespace.pop("config", None)
        return Recipe(**vars(parser.instantiate(namespace))), resume
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"recipe: {path}: {error}") from error


def train(arguments: Sequence[str]) -> None:
    """Runs a recipe to its end and draws it."""
    recipe, resume = load_recipe(arguments)
    from .report import closing_line, draw
    from .trainer import Trainer

    trainer = Trainer(recipe, resume)
    trainer.run()
    root = trainer.directory.root
    if recipe.evaluation is not None and trainer.evaluator is not None:
        shown = [prompt.text for prompt in trainer.evaluator.prompts[: recipe.evaluation.grid_prompts]]
        for picture in draw(root, shown, recipe.evaluation.grid_samples):
            print(f"drew {picture}")
    print(closing_line(root, recipe.name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    command, rest = given[0], given[1:]
    script: Callable[[], None] | None = None
    try:
        if command == "train" and rest:
            train(rest)
        elif command == "run" and rest:
            from .compat.runner import prepare

            script = prepare(rest)
        elif command == "info" and not rest:
            from .info import main as info

            info()
        else:
            print(USAGE, end="", file=sys.stderr)
            return 2
    except ImportError as error:
        print(f'dancegrpo-fast {command}: {error}; want pip install "dancegrpo_fast[train]"', file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"dancegrpo-fast {command}: {error}", file=sys.stderr)
        return 1
    if script is not None:
        script()  # out here, where its exceptions and its exit status are its own
    return 0


if __name__ == "__main__":
    sys.exit(main())
