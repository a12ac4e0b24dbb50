"""Which prompts an iteration takes."""

from collections.abc import Sequence

import torch

from ..rng import generator
from .prompt import Prompt


def prompts_of_iteration(prompts: Sequence[Prompt], count: int, iteration: int, seed: int) -> list[Prompt]:
    """The prompts of one iteration: every epoch is its own permutation, and epochs follow each other without a gap."""
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
        chosen.append(prompts[orders[epoch][place]])
    return chosen


def prompts_of_run(prompts: Sequence[Prompt], count: int, iterations: int, seed: int) -> list[Prompt]:
    """The prompts of the first `iterations` iterations, each once, in the order in which they come up."""
    # The first epoch has every prompt once.
    return prompts_of_iteration(prompts, min(count * iterations, len(prompts)), 0, seed)
