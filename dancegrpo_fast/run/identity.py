"""What a run and its continuation have in common, and what may differ between them."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import fingerprint
from ..prompts import Prompt
from ..recipe import Recipe
from ..rewards import find_reward
from .changes import FREE, Change, completed, differences, settle

# Of files that `model.start_from` names.
START = "start_from"


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
    for part, found in model.denoiser_paths.items():
        for file in [found] if found.is_file() else sorted(found.iterdir()):
            if file.suffix in (".json", ".safetensors", ".bin"):
                files[f"{part}/{file.name}"] = file
    if (start := model.start) is not None and start.kind != "denoiser":
        root = start.path if start.path.is_dir() else start.path.parent
        files |= {f"{START}/{file.relative_to(root).as_posix()}": file for file in start.files()}
    return {
        "files": {name: fingerprint(file) for name, file in files.items() if file.is_file()},
        # Of which side in pixels; earlier checkpoints only say whether.
        "vae_in_tiles": model.tile or False,
    }


def check_run(
    folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any], accepted: Collection[str] = ()
) -> list[Change]:
    """How this run, which `run_identity` gave, differs from the one that made the checkpoint in `folder`.

    Args:
        folder: of the checkpoint.
        state: its own.
        identity: of this run.
        accepted: fields that may differ, or "all".

    Raises:
        ValueError: a difference that is not accepted, or fewer iterations than are done.
    """
    recipe, then = identity["recipe"], completed(Recipe, state["recipe"])
    args = [getattr(find_reward(one["name"]), "free_args", ()) for one in recipe["rewards"]]
    free = {*FREE, *(f"rewards[{place}].args.{name}" for place, names in enumerate(args) for name in names)}
    if recipe["train"]["schedule"] != "constant":
        # How fast it falls follows from it.
        free.discard("train.iterations")
    if recipe["model"]["compile"] == "whole":
        # What is computed again is part of the graph, and may change how it rounds.
        free.discard("model.checkpointing")
    found = differences(recipe, then, free)
    done, wanted = int(state["iteration"]), recipe["train"]["iterations"]
    if done > wanted:
        raise ValueError(f"train.iterations: got {wanted}, want at least the {done} of {folder}")
    ours, theirs = (_described(one, "training") for one in (identity, state))
    if ours != theirs:
        found.append(Change("prompts", ours, theirs))
    return settle(folder, found, accepted)


def evaluation_differs(state: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether later rows of `evaluations.jsonl` are of other samples or scores than those that are there."""
    now, then = identity["recipe"]["evaluation"], completed(Recipe, state["recipe"])["evaluation"]
    if now is None or then is None:
        return False
    prompts = [_described(one, "evaluation") for one in (identity, state)]
    return prompts[0] != prompts[1] or bool(differences(now, then, {"every", "prompts"}))


def _described(identity: Mapping[str, Any], kind: str) -> str:
    found = (identity.get("prompts") or {}).get(kind) or {"count": 0, "sha256": ""}
    return f"{found['count']} prompts {found['sha256'][:8]}"


def _decodes(tile: int | bool | None) -> str:
    if not tile:
        return "whole"
    return "in tiles" if tile is True else f"in tiles of {tile} pixels"


def check_model(
    folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any], accepted: Collection[str] = ()
) -> list[Change]:
    """How the model of this run, and what was chosen for it, differ from those of the checkpoint, as `check_run`.

    Raises:
        ValueError: a difference that is not accepted.
    """
    now, then = identity["model"], state.get("model") or {}
    ours, theirs, found = now["files"], then.get("files") or {}, []
    other = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
    started = [name for name in other if name.startswith(f"{START}/")]
    for field, names in (("model.path", [name for name in other if name not in started]), (f"model.{START}", started)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(Change(field, f"another {names[0]}{more}", "the files that it was made with"))
    if now["vae_in_tiles"] != then.get("vae_in_tiles"):
        decodes = [_decodes(one.get("vae_in_tiles")) for one in (now, then)]
        found.append(Change("model.vae_tiling", f"a VAE that decodes {decodes[0]}", f"one that decodes {decodes[1]}"))
    # Earlier checkpoints say it in the recipe only.
    reduced = state.get("gradient_sync") or state["recipe"]["train"].get("gradient_sync", "update")
    if identity["gradient_sync"] != reduced:
        found.append(Change("train.gradient_sync", identity["gradient_sync"], reduced))
    if identity["passes"] != state.get("passes", 2):
        found.append(Change("train.passes", identity["passes"], state.get("passes", 2)))
    return settle(folder, found, accepted)
