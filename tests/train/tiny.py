"""Tiny generators of both paradigms in ordinary diffusers folders, with weights drawn here."""

import json
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
from dancegrpo_fast.rewards import RewardInput

PROMPTS = ("red", "green", "blue", "")


class Brightness:
    """Mean of one colour channel."""

    def __init__(self, channel: int = 0) -> None:
        self.channel = channel

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        return inputs.frames[:, :, self.channel].mean(dim=(1, 2, 3))


class FirstGroup:
    """Mean red of the first prompt's samples, and equal rewards of the others'."""

    def __call__(self, inputs: RewardInput) -> torch.Tensor:
        return torch.where(inputs.group == 0, inputs.frames[:, :, 0].mean(dim=(1, 2, 3)), 0.5)


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


def _vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).save_pretrained(folder / "vae")


def _finish(folder: Path, family: str, tensors: dict[str, torch.Tensor]) -> Path:
    PromptStore(folder / "prompt_embeds", given_identity(family)).add(PROMPTS, tensors)
    (folder / "model_index.json").write_text("{}")
    return folder


def make_flux(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(0)
    _vae(folder)
    FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(folder / "scheduler")
    embeds = {"prompt_embeds": torch.randn(4, 3, 16), "pooled_prompt_embeds": torch.randn(4, 16)}
    return _finish(folder, "flux", embeds)


def make_diffusion(folder: Path) -> Path:
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    _vae(folder)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(folder / "scheduler")
    return _finish(folder, "stable_diffusion", {"prompt_embeds": torch.randn(4, 3, 16)})


def make_recipe(base: Path, output: Path, **changes: Any) -> Recipe:
    """Three prompts, groups of four, tiny models; `changes` are fields of any settings class."""
    flow = (base / "transformer").is_dir()
    prompts = output.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p, "colour": p}) + "\n" for p in PROMPTS[:3]))

    def fields(settings: type, /, **defaults: Any) -> dict[str, Any]:
        names = set(settings.__dataclass_fields__)  # type: ignore[attr-defined]  # every settings class is a dataclass
        return defaults | {name: changes.pop(name) for name in list(changes) if name in names}

    train = fields(
        TrainSettings,
        iterations=2,
        prompts_per_iteration=3,
        group_size=4,
        micro_batch=4,
        learning_rate=1e-3,
        timestep_fraction=0.7,
    )
    sampler = fields(SamplerSettings, kind="dance_sde" if flow else "ddim", num_steps=4, eta=0.5, height=16, width=16)
    model = fields(ModelSettings, family="flux" if flow else "stable_diffusion", path=str(base))
    return Recipe(
        name="tiny",
        model=ModelSettings(**model),
        sampler=SamplerSettings(**sampler),
        train=TrainSettings(**train),
        output_dir=str(output),
        **({"prompts": str(prompts), "rewards": [reward("Brightness")], "checkpoint_every": 1, "threads": 1} | changes),
    )


__all__ = ["EvaluationSettings", "LoraSettings", "make_diffusion", "make_flux", "make_recipe", "reward"]
