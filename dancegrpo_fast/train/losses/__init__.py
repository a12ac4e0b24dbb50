"""What an update minimises: `base.py` the protocol, and one file an objective."""

from collections.abc import Sequence

from torch import nn

from ...experts import trained
from ...processes import Processes
from ...recipe import Recipe
from ...transitions import TransitionTable
from ..reference import Reference
from .base import Loss as Loss
from .base import Outputs as Outputs
from .base import Term as Term
from .grpo import Grpo
from .grpo import check_steps as check_steps


def make_loss(
    recipe: Recipe, denoiser: nn.Module, table: TransitionTable, turns: Sequence[int], processes: Processes
) -> Loss:
    """The objective of a recipe.

    Args:
        recipe: of the run.
        denoiser: as loaded, before it is prepared.
        table: of the sampler.
        turns: of its steps, as `GeneratorModel` has them.
        processes: of the run.

    Raises:
        ValueError: settings that leave nothing to train on.
    """
    reference = None
    if recipe.train.kl_weight > 0:
        model = recipe.model
        started = model.start_from is not None and model.start_as == "adapter"
        adapters, compiled = model.lora is not None, model.compile
        reference = Reference(denoiser, processes, adapters=adapters, started=started, compiled=compiled)
    return Grpo(recipe, table, turns, len(trained(denoiser)), reference, processes.device)
