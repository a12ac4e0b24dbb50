"""`dancegrpo-fast`: train a recipe, plan its memory, run a script of another project, say what is installed."""

import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

USAGE = """usage: dancegrpo-fast train RECIPE.yaml [--resume auto|CHECKPOINT] [--train.iterations 10 ...]
       dancegrpo-fast evaluate RECIPE.yaml --output FOLDER [--checkpoint RUN|CHECKPOINT|MODEL] [--samplers ode,sde]
                               [--by COLUMN] [--weights model|ema] [--evaluation.prompts FILE ...]
       dancegrpo-fast run [--accelerate lossless|fast] [--latents DTYPE] [--dry-run ...] SCRIPT.py [ARGUMENTS]
       dancegrpo-fast memory MODEL|RECIPE.yaml [--frames 53 --height 480 --width 640 --lora 32 --gpu 80 ...]
                             [--json FILE] [--figures FOLDER]
       dancegrpo-fast profile RECIPE.yaml [--iterations 1] [--figures FOLDER] [--train.micro_batch 4 ...]
       dancegrpo-fast info

`evaluate` samples the recipe's evaluation prompts and writes pictures, scores.jsonl and a table.
`profile` measures iterations of a recipe beside what was predicted, and draws them; the run's folder stays as it is.
`memory` predicts every phase of an iteration without a GPU; it exits with 0 if the GPU holds it, 1 if not, 2 for bad
input. `dancegrpo-fast memory --help` lists its settings. With --figures it makes many plans: a minute or more.
`run` executes a published training script with its step functions replaced by this library's, and says which;
`dancegrpo-fast run --help` lists its options.
Every field of a recipe can be overridden: `dancegrpo-fast train RECIPE.yaml --help` lists them.
"""


def train(arguments: Sequence[str]) -> None:
    """Runs a recipe to its end and draws it."""
    from ..recipe import load_recipe

    recipe, options = load_recipe(arguments, resume=None)
    from ..files import writing
    from ..run.pictures import closing_line, draw
    from ..train.loop import Trainer

    trainer = Trainer(recipe, options["resume"])
    root = trainer.directory.root
    try:
        trainer.run()
        if not trainer.processes.is_main:
            return
        if recipe.evaluation is not None and trainer.evaluator is not None:
            shown = [prompt.text for prompt in trainer.evaluator.prompts[: recipe.evaluation.grid_prompts]]
            sampler = recipe.sampler
            with writing(root):
                pictures = draw(root, shown, recipe.evaluation.grid_samples, sampler.frames, sampler.fps)
            for picture in pictures:
                print(f"drew {picture}")
    except OSError as error:
        raise OSError(f"{error}; {_left(trainer.directory.newest(), arguments, options['resume'])}") from error
    print(closing_line(root, recipe.name))


def _left(newest: Path | None, arguments: Sequence[str], resume: str | None) -> str:
    """What is left of a run that ended early, and how it goes on."""
    if newest is None:
        return "no checkpoint had been written"
    more = [] if resume == "auto" else ["--resume", "auto"]
    return f"{newest} is whole, go on with: {shlex.join(['dancegrpo-fast', 'train', *arguments, *more])}"


def evaluate(arguments: Sequence[str]) -> None:
    """Scores a recipe's evaluation prompts with trained or untrained weights."""
    from ..recipe import load_recipe

    defaults = {"output": None, "checkpoint": None, "samplers": "ode,sde", "by": None, "weights": "model"}
    recipe, options = load_recipe(arguments, "evaluate", **defaults)
    if options["output"] is None:
        raise ValueError("output: got nothing, want a folder for samples and scores")
    from ..evaluate.scores import evaluate as run

    samplers = [name for name in (options["samplers"] or "").split(",") if name]
    table = run(recipe, options["checkpoint"], Path(options["output"]), samplers, options["by"], options["weights"])
    if table is not None:
        print(table)


def profile(arguments: Sequence[str]) -> None:
    """Measures a recipe's iterations, prints the report and draws it."""
    from ..recipe import load_recipe

    recipe, options = load_recipe(arguments, "profile", iterations="1", figures=None)
    iterations = options["iterations"] or ""
    if not iterations.isdecimal() or int(iterations) < 1:
        raise ValueError(f"iterations: got {options['iterations']}, want a whole number of at least 1")
    from ..profile.profiler import profile_recipe

    report = profile_recipe(recipe, int(iterations))
    print(report.table())
    if options["figures"] is not None:
        for picture in report.figures(options["figures"]):
            print(f"drew {picture}")


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
        elif command == "evaluate" and rest:
            evaluate(rest)
        elif command == "run" and rest:
            from .run import prepare

            script = prepare(rest)
        elif command == "memory" and rest:
            from .memory import run as memory

            return memory(rest)
        elif command == "profile" and rest:
            profile(rest)
        elif command == "info" and not rest:
            from ..info import main as info

            info()
        else:
            print(USAGE, end="", file=sys.stderr)
            return 2
    except ImportError as error:
        print(f'dancegrpo-fast {command}: {error}; want pip install "dancegrpo_fast[train]"', file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            # Of a reward, whose author needs the place.
            traceback.print_exception(error.__cause__)
        print(f"dancegrpo-fast {command}: {error}", file=sys.stderr)
        return 1
    if script is not None:
        script()  # out here, where its exceptions and its exit status are its own
    return 0
