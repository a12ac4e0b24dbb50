"""`dancegrpo-fast memory`: a plan of a model or of a recipe, from the command line."""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..memory.planning import measured
from ..memory.planning.cards import CARDS, USUAL, of_size
from ..memory.planning.rewards import REWARD_MODELS, REWARDS
from ..memory.planning.settings import GIB, Settings
from ..progress import say

# Listed without torch, which `specs` imports.
CONFIGS = resources.files("dancegrpo_fast.memory.planning") / "configs"
LISTS = ("target_modules", "offload", "rewards")


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        settings: what is planned.
        uncounted: what of the recipe is not in the plan, in words.
        json: a file for the plan, or None.
        figures: a folder for pictures, or None.
        thorough: more advice, which takes longer.
    """

    settings: Settings
    uncounted: Sequence[str]
    json: str | None
    figures: str | None
    thorough: bool


def parse(arguments: Sequence[str]) -> Request:
    """Reads the command line; of a recipe, what is given replaces what the recipe says.

    Raises:
        ValueError: an unknown setting, a value of the wrong type or range, or a recipe that cannot be planned.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog="dancegrpo-fast memory", exit_on_error=False, allow_abbrev=False)
    shipped = sorted(path.name.removesuffix(".json") for path in CONFIGS.iterdir())
    known = f"one of {', '.join(shipped)}; a diffusers folder, a name on the hub, or RECIPE.yaml"
    parser.add_argument("what", type=str, metavar="MODEL|RECIPE.yaml", help=known)
    parser.add_argument("--model", type=str, help="planned instead of the recipe's model.path")
    parser.add_class_arguments(Settings, None, skip={"model", "gpu_gib", "card", "measured", "others", *LISTS})
    parser.add_argument(
        "--card", type=str, help=f"one of {', '.join(CARDS)}: its memory as torch sees it, and its speed"
    )
    parser.add_argument(
        "--gpu",
        type=float,
        help="instead: 80 is an 80 GB card as torch sees it, a number that no card has are GiB (default: 80, or the "
        "recipe's memory_gib; this machine's GPU where `dancegrpo-fast rates` measured it)",
    )
    parser.add_argument("--target_modules", type=str, help="comma-separated")
    parser.add_argument("--offload", type=str, help="comma-separated")
    parser.add_argument("--rewards", type=str, help=f"comma-separated: {', '.join(REWARD_MODELS)}")
    parser.add_argument("--json", type=str, help="writes the plan to this file")
    parser.add_argument("--figures", type=str, help="draws five pictures into this folder, which takes two minutes")
    parser.add_argument("--thorough", type=bool, help="more advice, which takes longer (default: False)")
    try:
        given: dict[str, Any] = parser.parse_args(list(arguments), defaults=False).as_dict()
    except (ArgumentError, TypeError) as error:
        raise ValueError(_in_short(str(error))) from error
    if "json" in given and not Path(given["json"]).parent.is_dir():
        # Before a plan is made, which takes a while.
        raise ValueError(f"json: got {given['json']}, want a file in a folder that is there")
    what, model = given.pop("what"), given.pop("model", None)
    file, folder, thorough = given.pop("json", None), given.pop("figures", None), given.pop("thorough", False)
    if Path(what).suffix in (".yaml", ".yml"):
        base, left_out = _of_recipe(what, model, given)
    elif model is not None:
        raise ValueError(f'model: got "{model}" beside "{what}", want it with a recipe')
    else:
        base, left_out = Settings(what), []
    return Request(_changed(base, given), left_out, file, folder, thorough)


def _in_short(message: str) -> str:
    """jsonargparse's words about one value as `name: got X, want Y`."""
    found = re.match(r'Parser key "(\w+)":\s*Expected an? <class \'(\w+)\'>\. Got value: (.*)', message, re.DOTALL)
    return message if found is None else f"{found[1]}: got {found[3]}, want {found[2]}"


def _of_recipe(path: str, model: str | None, given: dict[str, Any]) -> tuple[Settings, list[str]]:
    from ..models.planning import left_out, settings_of
    from ..recipe import load_recipe

    recipe, _ = load_recipe([path], "memory")
    if recipe.model.dtype == "float32" and recipe.train.mixed_precision == "no":
        raise ValueError(
            f"recipe: got {path} in float32 throughout, want model.dtype bfloat16 or train.mixed_precision bf16, which "
            "are what is planned"
        )
    recipe.check_trained()
    processes = given.get("fsdp", recipe.train.sequence_parallel)
    strategy = given.get("strategy", "full_shard") if processes > 1 else "none"
    return settings_of(recipe, model=model, processes=processes, strategy=strategy), left_out(recipe)


def _changed(base: Settings, given: dict[str, Any]) -> Settings:
    changes = dict(given)
    for name in LISTS:
        if name in changes:
            changes[name] = tuple(part.strip() for part in changes[name].split(",") if part.strip())
    if "rewards" in changes:
        unknown = [name for name in changes["rewards"] if name not in REWARD_MODELS]
        if unknown:
            raise ValueError(f"rewards: got {', '.join(unknown)}, want some of {', '.join(REWARD_MODELS)}")
        # Rewards of one model share it.
        models = dict.fromkeys(REWARD_MODELS[name] for name in changes["rewards"])
        changes["rewards"] = tuple(REWARDS[name] for name in models)
    base = _on(base, changes)
    if "rates" in changes:
        changes["rates"] = replace(base.rates, **changes["rates"])
    return base.changed(**changes)


def _on(base: Settings, changes: dict[str, Any]) -> Settings:
    """On the card or of the capacity that is asked for, which is taken out of the changes."""
    name, gib = changes.pop("card", None), changes.pop("gpu", None)
    if name is not None and gib is not None:
        raise ValueError(f"gpu: got {gib:g} beside card {name}, want one of them")
    name = name or (of_size(gib) if gib is not None else None)
    if name is not None:
        return base.on(name)
    return _at_hand(base, changes) if gib is None else base.changed(gpu_gib=gib)


def _at_hand(base: Settings, changes: dict[str, Any]) -> Settings:
    """On the device of this machine, if `dancegrpo-fast rates` has measured it; a CPU only where it is asked for."""
    if not measured.path().exists():
        return base
    found = measured.at_hand(base, changes.get("device", "cuda"))
    if not found.measured or changes.get("device") == "cpu":
        return found
    import torch

    device = torch.cuda.get_device_properties(changes.get("device", "cuda"))
    # A recipe may say less.
    gib = base.gpu_gib if base.gpu_gib != CARDS[USUAL].gib else math.floor(device.total_memory / GIB * 100) / 100
    return found.changed(gpu_gib=gib, device=f"cuda:sm{device.major}{device.minor}")


def main(arguments: Sequence[str]) -> int:
    """Prints a plan; 0 if the device holds it, 1 if not, 2 for bad input."""
    try:
        asked = parse(arguments)
        from ..memory.planning.planner import plan

        found = plan(asked.settings, thorough=asked.thorough)
        say(found.table())
        if not asked.thorough and found.fits(asked.settings.gpu_gib):
            say("--thorough true tries more changes: quantised weights, block ops, more GPUs, other policies")
        if asked.uncounted:
            say("\nnot in it: " + "; ".join(asked.uncounted))
        if asked.json is not None:
            Path(asked.json).write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
        if asked.figures is not None:
            from ..memory.pictures.figures import draw

            for drawn in draw(found, asked.figures):
                say(str(drawn))
    except (ValueError, OSError) as error:
        # As it is called here.
        print(f"dancegrpo-fast memory: {re.sub('^gpu_gib:', 'gpu:', str(error))}", file=sys.stderr)
        return 2
    return 0 if found.fits(asked.settings.gpu_gib) else 1
