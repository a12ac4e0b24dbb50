"""What a run and its continuation have in common, and what may differ between them."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..files import fingerprint
from ..prompts import Prompt
from ..recipe import Recipe

# Fields that change no result, each for the reason beside it.
FREE = frozenset(
    {
        "name",  # a label
        "output_dir",  # results lie there
        "checkpoint_every",  # says when, not what
        "keep_checkpoints",  # likewise
        "evaluation.every",  # likewise; evaluations draw from generators of their own
        "threads",  # another number is warned about
        "prompts",  # the prompts themselves are compared
        "evaluation.prompts",  # likewise
        "model.path",  # the files that lie there are compared
        "model.denoiser",  # likewise
        "model.start_from",  # likewise
        "model.prompt_cache",  # a store of other rows is not used
        "model.checkpointing",  # every policy recomputes the same bits
        "model.memory_gib",  # chooses such a policy, and whether the VAE decodes in tiles
        "model.vae_tiling",  # whether it does is compared
        "train.iterations",  # nothing is scheduled by it
        "train.offload",  # copies keep their bits
        "train.rollout_replica",  # parameters are the same, gathered once or at every call
    }
)
SHOWN = 5  # differences
WIDTH = 80  # characters of a value


def differences(now: Any, then: Any, free: Collection[str] = (), name: str = "") -> list[str]:
    """The fields of two nested settings that differ, as `model.lora.rank: got 8, want 4`; a missing one is null.

    Args:
        now: settings, as they come from JSON.
        then: those that are wanted.
        free: dotted names that may differ.
        name: of both.
    """
    if isinstance(now, dict) and isinstance(then, dict):
        parts = [(f"{name}.{key}" if name else key, now.get(key), then.get(key)) for key in {**now, **then}]
    elif isinstance(now, list) and isinstance(then, list) and any(isinstance(one, dict) for one in now):
        parts = [(f"{name}[{place}]", *pair) for place, pair in enumerate(zip_longest(now, then))]
    elif name in free or now == then:
        return []
    else:
        return [f"{name}: got {_shown(now)}, want {_shown(then)}"]
    return [line for part, one, other in parts for line in differences(one, other, free, part)]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."


def joined(found: Sequence[str]) -> str:
    """Differences as a part of a message, the first of many."""
    more = len(found) - SHOWN
    return "; ".join(found[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Of texts and columns in their order; a picture counts by its file's name and size, wherever it lies."""
    digest = hashlib.sha256()
    for prompt in prompts:
        meta, image = prompt.columns(), prompt.meta.get("image")
        # Not `Path.is_file`, which raises for text that is too long for a name.
        if isinstance(image, str) and os.path.isfile(image):
            meta["image"] = [os.path.basename(image), os.path.getsize(image)]
        digest.update(json.dumps([prompt.text, meta], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def run_identity(recipe: Recipe, prompts: Sequence[Prompt], evaluated: Sequence[Prompt]) -> dict[str, Any]:
    """The recipe and its prompts, as a checkpoint's state has them and `check_run` compares them."""
    both = {"training": prompts, "evaluation": evaluated}
    return {
        "recipe": json.loads(json.dumps(recipe.as_dict())),
        "prompts": {name: {"count": len(some), "sha256": prompts_digest(some)} for name, some in both.items()},
    }


def model_identity(model: Any) -> dict[str, Any]:
    """The files of a loaded `DiffusersModel` by their fingerprints, and whether its VAE decodes in tiles."""
    folder: Path = model.folder
    parts = ("vae", "scheduler", *model.text_parts, "prompt_embeds")
    files = {file.relative_to(folder).as_posix(): file for part in parts for file in sorted((folder / part).rglob("*"))}
    # A denoiser may lie at the root of a repository, beside much else.
    found: Path = model.denoiser_path
    for file in [found] if found.is_file() else sorted(found.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin"):
            files[f"{model.denoiser_part}/{file.name}"] = file
    for file in model.start.files() if model.start is not None and model.start.kind != "denoiser" else ():
        files[f"start_from/{file.name}"] = file
    return {
        "files": {name: fingerprint(file) for name, file in files.items() if file.is_file()},
        "vae_in_tiles": bool(getattr(model.vae, "use_tiling", False)),
    }


def check_run(folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises ValueError where the checkpoint in `folder` with this state is of another run than `run_identity` gave."""
    recipe, prompts = identity["recipe"], identity["prompts"]
    found = differences(recipe, state["recipe"], FREE)
    if found:
        raise ValueError(f"resume: {folder} was made with another recipe; {joined(found)}")
    done, wanted = int(state["iteration"]), recipe["train"]["iterations"]
    if done > wanted:
        raise ValueError(f"train.iterations: got {wanted}, want at least the {done} of {folder}")
    then = state.get("prompts") or {}
    for kind, ours in prompts.items():
        if ours != then.get(kind):
            path = (recipe["evaluation"] or {}).get("prompts") if kind == "evaluation" else None
            count = then.get(kind, {}).get("count", "recorded")
            raise ValueError(
                f"prompts: got {ours['count']} for {kind} from {path or recipe['prompts']}, want the {count} that "
                f"{folder} was made with, unchanged and in their order"
            )


def check_model(folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises ValueError where the checkpoint in `folder` was made with another model than the run's identity has."""
    now, then, path = identity["model"], state.get("model") or {}, identity["recipe"]["model"]["path"]
    ours, theirs = now["files"], then.get("files") or {}
    other = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
    if other:
        raise ValueError(
            f"model.path: got {path}, want the model that {folder} was made with; {len(other)} of its files differ, "
            f"{other[0]} for one"
        )
    if now["vae_in_tiles"] != then.get("vae_in_tiles"):
        raise ValueError(
            f"model.vae_tiling: got a VAE that decodes {'in tiles' if now['vae_in_tiles'] else 'whole'}, want it "
            f"as it was for {folder}, whose samples would have other bits"
        )
