"""A recipe for each family on its tiny folder, and the same call of its pipeline."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dancegrpo_fast.models import load_model
from dancegrpo_fast.prompts import Prompt, load_prompts
from dancegrpo_fast.recipe import LoraSettings, Recipe

from ..train.tiny import recipe_of

# Of different lengths.
PROMPTS = ("a", "g r e e n", "b c d e f g")
NEGATIVE = "x y"
STEPS = 3


@dataclass(frozen=True)
class Case:
    """How a family is sampled.

    Attributes:
        family: as in recipes.
        kind: of the sampler.
        size: height, and width where that is not given.
        guidance: its scale.
        call: the pipeline's arguments that say the same.
        width: in pixels.
        frames: of the video.
        targets: names of the modules that get LoRA.
        patched: whether there are block ops for it.
        image: the prompts have first frames.
    """

    family: str
    kind: str
    size: int
    guidance: float
    call: dict[str, Any]
    width: int | None = None
    frames: int = 1
    patched: bool = True
    image: bool = False
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


CASES = {
    "flux": Case("flux", "dance_sde", 16, 3.5, {"guidance_scale": 3.5, "max_sequence_length": 12}),
    "stable_diffusion": Case(
        "stable_diffusion", "ddim", 16, 5.0, {"guidance_scale": 5.0, "negative_prompt": [NEGATIVE] * 2}, patched=False
    ),
    "hunyuan_video": Case(
        "hunyuan_video",
        "dance_sde",
        32,
        6.0,
        {"guidance_scale": 6.0, "num_frames": 5, "max_sequence_length": 24},
        frames=5,
    ),
    "skyreels_i2v": Case(
        "skyreels_i2v",
        "dance_sde",
        32,
        5.0,
        {
            "guidance_scale": 1.0,
            "true_cfg_scale": 5.0,
            "negative_prompt": [NEGATIVE] * 2,
            "num_frames": 5,
            "max_sequence_length": 24,
        },
        frames=5,
        image=True,
    ),
    "sd3": Case(
        "sd3",
        "dance_sde",
        16,
        4.0,
        {"guidance_scale": 4.0, "negative_prompt": [NEGATIVE] * 2, "max_sequence_length": 12},
    ),
    "qwen_image": Case(
        "qwen_image",
        "dance_sde",
        16,
        4.0,
        {"true_cfg_scale": 4.0, "negative_prompt": [NEGATIVE] * 2, "max_sequence_length": 24},
    ),
    "wan": Case(
        "wan",
        "dance_sde",
        16,
        5.0,
        {"guidance_scale": 5.0, "negative_prompt": [NEGATIVE] * 2, "num_frames": 5, "max_sequence_length": 12},
        width=32,
        frames=5,
    ),
}


def write_prompts(folder: Path, case: Case) -> Path:
    """The prompt file; pictures of different sizes beside it where the family needs first frames."""
    rows = []
    for number, text in enumerate(PROMPTS):
        row: dict[str, Any] = {"prompt": text}
        if case.image:
            row["image"] = f"{number}.png"
            pixels = torch.randint(0, 256, (20 + number, 30, 3), generator=torch.Generator().manual_seed(number))
            Image.fromarray(pixels.byte().numpy()).save(folder / row["image"])
        rows.append(row)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_recipe(case: Case, base: Path, output: Path, **changes: Any) -> Recipe:
    """`changes` are fields of any settings class. The run goes to `output`, prompts and images beside it."""
    output.parent.mkdir(exist_ok=True)
    prompts = write_prompts(output.parent, case)

    if changes.pop("lora", False):
        changes["lora"] = LoraSettings(rank=2, alpha=6, target_modules=case.targets)
    fixed = {
        "family": case.family,
        "path": str(base),
        "prompt_cache": str(base.parent / "cache"),
        "max_text_tokens": case.call.get("max_sequence_length"),
        "kind": case.kind,
        "num_steps": STEPS,
        "eta": 0.5,
        "height": case.size,
        "width": case.width or case.size,
        "frames": case.frames,
        "guidance_scale": case.guidance,
        "negative_prompt": NEGATIVE,
        "iterations": 3,
        "prompts_per_iteration": 2,
        "group_size": 3,
        "micro_batch": 4,
        "learning_rate": 1e-3,
        "timestep_fraction": 0.5,
        "keep_checkpoints": 9,
        "prompts": str(prompts),
        "output_dir": str(output),
    }
    return recipe_of(**fixed | changes)


def load(recipe: Recipe) -> tuple[Any, list[Prompt]]:
    """The model and the recipe's prompts."""
    prompts = load_prompts(recipe.prompts)
    return load_model(recipe, torch.device("cpu"), prompts, training=False), prompts
