"""A recipe for each family on its tiny folder, and the same call of its pipeline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dancegrpo_fast.models import load_model
from dancegrpo_fast.prompts import Prompt, load_prompts
from dancegrpo_fast.recipe import LoraSettings, Recipe

from ..train import tiny

# Of different lengths.
PROMPTS = ("a", "g r e e n", "b c d e f g")
NEGATIVE = "x y"
STEPS = 3


@dataclass(frozen=True)
class Case:
    """How a family is sampled: height and width, the scale of guidance, and its pipeline's call of the same.

    `reference` is the size of a picture to edit.
    """

    family: str
    size: tuple[int, int]
    guidance: float
    call: dict[str, Any]
    reference: tuple[int | None, int | None] = (None, None)

    @property
    def image(self) -> bool:
        """The prompts have pictures: first frames, or what is edited."""
        return self.family == "skyreels_i2v" or self.reference != (None, None)


WITHOUT = {"negative_prompt": [NEGATIVE] * 2}
CLIP = {"num_frames": 5, "max_sequence_length": 24}
# Else Kontext's pipeline makes pictures of a million pixels.
UNSCALED = {"max_area": 16 * 16, "_auto_resize": False}
# Of text and picture, where the picture is small.
EDIT_TOKENS = 64
CASES = {
    case.family: case
    for case in (
        Case("flux", (16, 16), 3.5, {"guidance_scale": 3.5, "max_sequence_length": 12}),
        Case("flux_kontext", (16, 16), 3.5, {"guidance_scale": 3.5, "max_sequence_length": 12} | UNSCALED, (20, 28)),
        Case("stable_diffusion", (16, 16), 5.0, {"guidance_scale": 5.0} | WITHOUT),
        Case("hunyuan_video", (32, 32), 6.0, {"guidance_scale": 6.0} | CLIP),
        Case("skyreels_i2v", (32, 32), 5.0, {"guidance_scale": 1.0, "true_cfg_scale": 5.0} | WITHOUT | CLIP),
        Case("sd3", (16, 16), 4.0, {"guidance_scale": 4.0, "max_sequence_length": 12} | WITHOUT),
        Case("qwen_image", (16, 16), 4.0, {"true_cfg_scale": 4.0, "max_sequence_length": 24} | WITHOUT),
        Case("qwen_image_edit", (16, 16), 4.0, {"true_cfg_scale": 4.0, "max_sequence_length": 288} | WITHOUT, (32, 64)),
        Case("wan", (16, 32), 5.0, {"guidance_scale": 5.0} | WITHOUT | CLIP | {"max_sequence_length": 12}),
    )
}


def write_prompts(file: Path, case: Case) -> None:
    """Pictures of different sizes beside the file where the family needs them."""
    rows = []
    for number, text in enumerate(PROMPTS):
        rows.append({"prompt": text})
        if case.image:
            rows[-1]["image"] = f"{number}.png"
            pixels = torch.randint(0, 256, (20 + number, 30, 3), generator=torch.Generator().manual_seed(number))
            Image.fromarray(pixels.byte().numpy()).save(file.with_name(f"{number}.png"))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_recipe(case: Case, base: Path, output: Path, **changes: Any) -> Recipe:
    """`changes` are fields of any settings class. The run goes to `output`, prompts and images beside it."""
    output.parent.mkdir(exist_ok=True)
    if changes.pop("lora", False):
        changes["lora"] = LoraSettings(rank=2, alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    fixed = {
        "family": case.family,
        "kind": "ddim" if case.family == "stable_diffusion" else "dance_sde",
        "prompt_cache": str(base.parent / "cache"),
        "max_text_tokens": case.call.get("max_sequence_length"),
        "num_steps": STEPS,
        "height": case.size[0],
        "width": case.size[1],
        "frames": case.call.get("num_frames", 1),
        "reference_height": case.reference[0],
        "reference_width": case.reference[1],
        "guidance_scale": case.guidance,
        "negative_prompt": NEGATIVE,
        "iterations": 3,
        "prompts_per_iteration": 2,
        "group_size": 3,
        "timestep_fraction": 0.5,
        "keep_checkpoints": 9,
    }
    recipe = tiny.make_recipe(base, output, **fixed | changes)
    write_prompts(Path(recipe.prompts), case)
    return recipe


def shards(store: Path) -> list[list[str]]:
    """The texts of each part of a prompt store."""
    return [json.loads(path.read_text()) for path in store.glob("*.json") if path.stem != "identity"]


def load(recipe: Recipe) -> tuple[Any, list[Prompt]]:
    """The model and the recipe's prompts."""
    prompts = load_prompts(recipe.prompts)
    return load_model(recipe, torch.device("cpu"), prompts, training=False), prompts
