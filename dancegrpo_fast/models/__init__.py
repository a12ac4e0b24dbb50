"""Model families, one file each: how to encode, call and decode."""

from collections.abc import Sequence
from typing import cast

import torch

from ..prompts import Prompt
from ..recipe import Recipe
from .base import DiffusersModel
from .base import of_evaluation as of_evaluation
from .family import FAMILIES as FAMILIES
from .family import family_of as family_of
from .generator import GeneratorModel as GeneratorModel
from .generator import check_frames as check_frames
from .generator import decode as decode
from .guided import Conditioning as Conditioning
from .setup import prepare


def load_model(
    recipe: Recipe,
    device: torch.device,
    prompts: Sequence[Prompt],
    *,
    reached: Sequence[Prompt] | None = None,
    training: bool = True,
) -> GeneratorModel:
    """The model that the recipe names, on `device`, ready to encode `reached`, set up as `recipe.model` says.

    Where accelerate's configuration says FSDP2, the denoiser waits for `Processes.prepare` on the host.

    Args:
        recipe: the run.
        device: of the model.
        prompts: of the recipe's files; how long text is depends on them.
        reached: those that will be encoded; None: all.
        training: whether a backward follows; without one nothing is set up to be computed again.

    Raises:
        ValueError: an unknown family, a folder that is not one, a size the model cannot make, or a setting of
            `recipe.model` that the model or the device cannot have.
    """
    factory = family_of(recipe.model)
    factory.check_prompts(prompts)
    encoded = prompts if reached is None else reached
    evaluation = None if recipe.evaluation is None else recipe.evaluation.sampling(recipe.sampler)
    model: DiffusersModel = factory(recipe.model, recipe.sampler, device, encoded, evaluation)
    model.cut_text(prompts, recipe.train.sequence_parallel)
    prepare(model, recipe, device, encoded, training=training)
    return cast(GeneratorModel, model)
