"""Recipes: all parse, and those of the paper have its settings."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dancegrpo_fast import transitions
from dancegrpo_fast.models import FAMILIES
from dancegrpo_fast.recipe import Recipe, load_recipe
from dancegrpo_fast.rewards import BY_NAME

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))


class Row(NamedTuple):
    """A row of the paper's table: the model, its sampler, the group, and how many steps of a sample are trained."""

    family: str
    size: tuple[int, int, int]
    guidance: float
    steps: int
    shift: float | None
    eta: float
    group: tuple[int, int]
    kept: int
    selected: int
    learning_rate: float


SD = Row("stable_diffusion", (1, 512, 512), 5.0, 50, None, 1.0, (16, 4), 16, 49, 1e-5)
FLUX = Row("flux", (1, 720, 720), 3.5, 16, 3.0, 0.3, (12, 1), 12, 9, 1e-5)
HUNYUAN = Row("hunyuan_video", (53, 480, 480), 6.0, 16, 5.0, 0.25, (24, 1), 8, 9, 1e-5)
ROWS = {
    "sd14_hps": SD,
    "sd14_hps_clip": SD,
    "sd14_hps_best_of_n": SD._replace(group=(64, 4)),
    "flux_hps": FLUX,
    "flux_hps_clip": FLUX,
    "flux_binary_hps": FLUX,
    "flux_lora_hps": FLUX._replace(steps=12, group=(12, 2), selected=6, learning_rate=3e-4),
    "hunyuan_video_vq_mq": HUNYUAN,
    "hunyuan_t2i_hps": HUNYUAN._replace(size=(1, 720, 720), group=(12, 1), kept=12),
    "skyreels_i2v_mq": Row("skyreels_i2v", (53, 400, 640), 5.0, 16, 7.0, 0.3, (8, 1), 8, 9, 1e-5),
}


def load(name: str) -> Recipe:
    return load_recipe([str(FOLDER / f"{name}.yaml")])[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_parses_and_names_what_there_is(file: Path) -> None:
    recipe = load_recipe([str(file)])[0]
    assert recipe.name == file.stem
    assert recipe.model.family in FAMILIES
    scored = [*recipe.rewards, *(recipe.evaluation.rewards if recipe.evaluation else [])]
    assert all(reward.name in BY_NAME or ":" in reward.name for reward in scored)


@pytest.mark.parametrize("name", ROWS)
def test_has_the_papers_settings(name: str) -> None:
    recipe, row = load(name), ROWS[name]
    model, sampler, train = recipe.model, recipe.sampler, recipe.train
    found = Row(
        model.family,
        (sampler.frames, sampler.height, sampler.width),
        sampler.guidance_scale,
        sampler.num_steps,
        sampler.shift,
        sampler.eta,
        (train.group_size, train.prompts_per_iteration),
        train.group_size if train.best_of_n is None else 2 * train.best_of_n,
        selected_steps(recipe),
        train.learning_rate,
    )
    assert found == row
    assert sampler.shared_noise and sampler.window is None and train.kl_weight == 0.0
    shared = (train.max_grad_norm, train.weight_decay, train.clip_range, train.advantage_clip, train.inner_epochs)
    assert shared == (1.0, 1e-4, 1e-4, 5.0, 1)
    assert (recipe.model.dtype, train.mixed_precision) == ("float32", "bf16")


def selected_steps(recipe: Recipe) -> int:
    """As the trainer counts them: a share of the steps that draw noise, without the last."""
    sampler = recipe.sampler
    if recipe.model.family == "stable_diffusion":
        alphas = [0.999 - 0.0009 * t for t in range(1000)]
        spacing = 1000 // sampler.num_steps
        table = transitions.ddim(alphas, list(range(1000 - spacing + 1, 0, -spacing)), sampler.eta)
    else:
        table = transitions.dance_sde(transitions.shifted_sigmas(sampler.num_steps, sampler.shift or 1.0), sampler.eta)
    noisy = [step for step in range(len(table) - 1) if table.tau[step] > 0]
    return int(recipe.train.timestep_fraction * len(noisy) + 1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_the_evaluation_has_a_judge_that_is_not_trained_on(name: str) -> None:
    recipe = load(name)
    assert recipe.evaluation is not None and recipe.evaluation.prompts not in (None, recipe.prompts)
    trained = {reward.name for reward in recipe.rewards}
    scored = {reward.name for reward in recipe.evaluation.rewards}
    assert trained < scored


def test_what_single_recipes_are_about() -> None:
    def trained(name: str) -> Any:
        return [(reward.name, reward.threshold) for reward in load(name).rewards]

    assert trained("flux_binary_hps") == [("hps", 0.28)]
    assert trained("sd14_hps_clip") == trained("flux_hps_clip") == [("hps", None), ("clip_score", None)]
    assert trained("hunyuan_video_vq_mq") == [("videoalign_vq", None), ("videoalign_mq", None)]
    assert trained("skyreels_i2v_mq") == [("videoalign_mq", None)]
    lora = load("flux_lora_hps").model.lora
    assert lora is not None and lora.rank == 128
    assert [name for name in ROWS if load(name).model.lora is not None] == ["flux_lora_hps"]
    assert load("sd14_hps_best_of_n").train.best_of_n == 8
