"""One of two gloo processes that evaluate a recipe together. Started by test_evaluate.py.

Usage: evaluate_worker.py RANK FOLDER, with the recipe as `FOLDER/recipe.json`; the scores go to `FOLDER/scores`.
"""

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[2]))
    from dancegrpo_fast.evaluate.scores import evaluate
    from dancegrpo_fast.recipe import load_recipe
    from tests.train.parallel_worker import group

    with group(folder, "evaluate", False, rank, 2):
        recipe, _ = load_recipe([str(folder / "recipe.json")])
        table = evaluate(recipe, None, folder / "scores", samplers=["ode"])
        assert (table is None) == (rank != 0)
    with group(folder, "split", False, rank, 2):
        split = replace(recipe, train=replace(recipe.train, sequence_parallel=2))
        evaluate(split, None, folder / "split", samplers=["ode"])
    with group(folder, "sharded", True, rank, 2):
        try:
            evaluate(recipe, None, folder / "sharded", samplers=["ode"])
        except ValueError as error:
            (folder / f"error.{rank}").write_text(str(error))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), Path(sys.argv[2]))
    except BaseException:
        # The other process may wait for this one in a collective.
        traceback.print_exc()
        os._exit(1)
