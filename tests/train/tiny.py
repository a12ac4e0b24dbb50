"""Tiny generators of both paradigms in ordinary diffusers folders, with weights drawn here."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast.models.prompt_store import PromptStore, given_identity
from dancegrpo_fast.recipe import (
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    Recipe,
    RewardSettings,
    SamplerSettings,
    TrainSettings,
)
from dancegrpo_fast.rewards import RewardInput, UnscoredError

from ..models import parts

PROMPTS = ("red", "green", "blue", "")


class Brightness:
    """Mean of one colour channel."""

    def __init__(self, channel: int = 0) -> None:
        self.channel = channel

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        return inputs.frames[:, :, self.channel].mean(dim=(1, 2, 3))


class Asked(Brightness):
    """Of a server, wherever it is."""

    free_args = frozenset({"url"})

    def __init__(self, url: str = "", channel: int = 0) -> None:
        super().__init__(channel)


class Interrupted(Brightness):
    """One process gets a signal in one of its calls, counted from 1, or fails in it where that is 0.

    Args:
        call: in which.
        number: of the signal.
        mark: a file that is made then; where it is there already nothing happens.
        rank: of the process.
    """

    def __init__(self, call: int, number: int, mark: str, rank: int = 1) -> None:
        super().__init__()
        self.left, self.number, self.mark, self.rank = call, number, Path(mark), str(rank)

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        self.left -= 1
        if self.left == 0 and os.environ.get("RANK") == self.rank and not self.mark.exists():
            self.mark.touch()
            if self.number == 0:
                raise KeyError("no such key")
            os.kill(os.getpid(), self.number)
        return super().__call__(inputs)


class FirstGroup:
    """Mean red of the first prompt's samples, and equal rewards of the others'."""

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        return torch.where(inputs.group == 0, inputs.frames[:, :, 0].mean(dim=(1, 2, 3)), 0.5)


class Steady:
    """Mean red of the first prompt's samples; .97 and what rounding leaves of the others'."""

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        red = inputs.frames[:, :, 0].mean(dim=(1, 2, 3))
        return torch.where(inputs.group == 0, red, 0.97 + 4e-5 * (red - 0.5))


class Refusing(Brightness):
    """Does not score every seventh shade of the first pixel."""

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        shades = (inputs.frames[:, 0, 0, 0, 0] * 255).round().int() % 7
        refused = (shades == 0).nonzero().flatten().tolist()
        if refused:
            raise UnscoredError(super().__call__(inputs), dict.fromkeys(refused, "no such shade"))
        return super().__call__(inputs)


class Carried(Brightness):
    """Can be moved."""

    def to(self, device: str | torch.device) -> None:
        pass


class Constant:
    """Equal rewards."""

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        return torch.full((len(inputs.prompts),), 0.5)


class Broken:
    """Fails in a chosen way."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, inputs: RewardInput) -> Any:
        count = len(inputs.prompts)
        if self.how == "raises":
            raise KeyError("no such key")
        return {
            "nan": torch.tensor([float("nan")] * count),
            "shape": torch.zeros(count, 1),
            "integers": torch.zeros(count, dtype=torch.int64),
            "list": [0.0] * count,
        }[self.how]


def reward(name: str, **settings: Any) -> RewardSettings:
    """A reward of this file."""
    args = settings.pop("args", {})
    return RewardSettings(name=f"{Brightness.__module__}:{name}", args=args, **settings)


def _finish(
    folder: Path, family: str, denoiser: Any, scheduler: Any, prompts: Sequence[str], tensors: dict[str, torch.Tensor]
) -> Path:
    parts.image_vae(scaling_factor=1.0, shift_factor=0.0).save_pretrained(folder / "vae")
    denoiser.save_pretrained(folder / ("unet" if family == "stable_diffusion" else "transformer"))
    scheduler.save_pretrained(folder / "scheduler")
    PromptStore(folder / "prompt_embeds", given_identity(family)).add(prompts, tensors)
    (folder / "model_index.json").write_text("{}")
    return folder


def make_flux(folder: Path, prompts: Sequence[str] = PROMPTS, text_tokens: int = 3) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    count = len(prompts)
    embeds = {"prompt_embeds": torch.randn(count, text_tokens, 16), "pooled_prompt_embeds": torch.randn(count, 16)}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return _finish(folder, "flux", parts.flux_transformer(16), scheduler, prompts, embeds)


def make_diffusion(folder: Path) -> Path:
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    embeds = {"prompt_embeds": torch.randn(4, 3, 16)}
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return _finish(folder, "stable_diffusion", parts.unet(16), scheduler, PROMPTS, embeds)


def recipe_of(**flat: Any) -> Recipe:
    """Fields of any settings class, each in its place."""
    settings = {"train": TrainSettings, "sampler": SamplerSettings, "model": ModelSettings}
    made = {
        name: kind(**{field: flat.pop(field) for field in list(flat) if field in kind.__dataclass_fields__})
        for name, kind in settings.items()
    }
    return Recipe(
        name="tiny", **made, **{"rewards": [reward("Brightness")], "checkpoint_every": 1, "threads": 1} | flat
    )


def make_recipe(base: Path, output: Path, **changes: Any) -> Recipe:
    """Three prompts, groups of four, tiny models; `changes` are fields of any settings class."""
    flow = (base / "transformer").is_dir()
    prompts = output.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p, "colour": p}) + "\n" for p in PROMPTS[:3]))

    fixed = {
        "family": "flux" if flow else "stable_diffusion",
        "path": str(base),
        "kind": "dance_sde" if flow else "ddim",
        "num_steps": 4,
        "eta": 0.5,
        "height": 16,
        "width": 16,
        "iterations": 2,
        "prompts_per_iteration": 3,
        "group_size": 4,
        "micro_batch": 4,
        "learning_rate": 1e-3,
        "timestep_fraction": 0.7,
        "prompts": str(prompts),
        "output_dir": str(output),
    }
    return recipe_of(**fixed | changes)


def write_recipe(recipe: Recipe, file: Path) -> Path:
    """As YAML, which JSON is."""
    file.write_text(json.dumps(recipe.as_dict()))
    return file


__all__ = ["EvaluationSettings", "LoraSettings", "make_diffusion", "make_flux", "make_recipe", "reward"]
