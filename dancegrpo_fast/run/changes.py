"""What differs between a recorded run and this one: what may, what is taken when asked for, and what cannot be."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args, get_type_hints

# Fields that change no result, each for the reason beside it; what is within them neither.
FREE = frozenset(
    {
        "name",  # a label
        "output_dir",  # results lie there
        "tracking",  # who else is told of them
        "checkpoint_every",  # says when, not what
        "keep_checkpoints",  # likewise
        "evaluation",  # draws from generators of its own; that it is another one is said
        "threads",  # another number is warned about
        "prompts",  # the prompts themselves are compared
        "rewards[].args.device",  # says where; what else of a reward does, its class says (`free_args`)
        "rewards[].on_error",  # of samples that have no score
        "rewards[].max_dropped",  # likewise
        "model.path",  # the files that lie there are compared
        "model.denoiser",  # likewise
        "model.start_from",  # likewise
        "model.prompt_cache",  # a store of other rows is not used
        "model.checkpointing",  # every policy recomputes the same bits, but for a compiled whole: see `check_run`
        "model.blocks_to_swap",  # copies keep their bits
        "model.memory_gib",  # chooses such a policy, and whether the VAE decodes in tiles
        "model.vae_tiling",  # whether it does, and in which, is compared
        "model.vae_tile",  # likewise
        "train.gradient_sync",  # what it came to is compared
        "train.passes",  # likewise
        "train.iterations",  # a constant learning rate does not look at it, see `check_run`
        "train.offload",  # copies keep their bits
        "train.rollout_replica",  # parameters are the same, gathered once or at every call
    }
)
# What the weights of a checkpoint do not fit.
NEVER = frozenset({"model.family", "model.lora", "model.lora.rank", "model.lora.target_modules"})
ALL = "all"
SHOWN = 5  # differences
WIDTH = 80  # characters of a value


@dataclass(frozen=True)
class Change:
    """A field, as it is now and as it was."""

    field: str
    now: Any
    then: Any

    def __str__(self) -> str:
        return f"{self.field}: got {_shown(self.now)}, want {_shown(self.then)}"

    def told(self) -> str:
        """Once it is accepted."""
        return f"{self.field} is {_shown(self.now)}, was {_shown(self.then)}"


def differences(now: Any, then: Any, free: Collection[str] = (), name: str = "") -> list[Change]:
    """The fields of two nested settings that differ, as `model.lora.rank: got 8, want 4`; a missing one is null.

    Args:
        now: settings, as they come from JSON.
        then: those that are wanted.
        free: dotted names that may differ, with all that is within them; `rewards[].url` is of every reward.
        name: of both.
    """
    if now == then or any(within(one, part) for one in (name, re.sub(r"\[\d+\]", "[]", name)) for part in free):
        return []
    if isinstance(now, dict) and isinstance(then, dict):
        parts = [(f"{name}.{key}" if name else key, now.get(key), then.get(key)) for key in {**now, **then}]
    elif isinstance(now, list) and isinstance(then, list) and any(isinstance(one, dict) for one in now):
        parts = [(f"{name}[{place}]", *pair) for place, pair in enumerate(zip_longest(now, then))]
    else:
        return [Change(name, now, then)]
    return [change for part, one, other in parts for change in differences(one, other, free, part)]


def within(name: str, part: str) -> bool:
    """Whether a dotted name is `part` or lies in it."""
    return name == part or name.startswith((f"{part}.", f"{part}["))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."


def joined(found: Sequence[Change]) -> str:
    """Differences as a part of a message, the first of many."""
    more = len(found) - SHOWN
    return "; ".join(map(str, found[:SHOWN])) + (f"; and {more} more" if more > 0 else "")


def completed(kind: type, recorded: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings of a dataclass, with the defaults of fields that are newer than the record."""
    found, hints = dict(recorded), get_type_hints(kind)
    for field in fields(kind):
        if field.name not in recorded:
            if field.default_factory is not MISSING:
                found[field.name] = field.default_factory()
            elif field.default is not MISSING:
                found[field.name] = field.default
            continue
        hint, value = hints[field.name], recorded[field.name]
        for inner in (one for one in (hint, *get_args(hint)) if isinstance(one, type) and is_dataclass(one)):
            if isinstance(value, dict):
                found[field.name] = completed(inner, value)
            elif isinstance(value, list):
                found[field.name] = [completed(inner, one) for one in value]
    return found


def read_accepted(asked: str | None, *recipes: Any) -> list[str]:
    """`--accept-changes`: "all", or names of fields with commas between them.

    Args:
        asked: as given; None is nothing.
        recipes: nested settings that have the fields, one of them at least.

    Raises:
        ValueError: a name that is no field.
    """
    names = [] if asked is None else [name.strip() for name in asked.split(",")]
    known = {ALL, *(name for recipe in recipes for name in _names(recipe))}
    for name in names:
        if name not in known:
            raise ValueError(
                f'accept-changes: got "{name}", want "all" or fields of the recipe, as train.learning_rate'
            )
    return names


def _names(settings: Any, name: str = "") -> Iterator[str]:
    if name:
        yield name
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _names(value, f"{name}.{key}" if name else key)
    elif isinstance(settings, list):
        for place, value in enumerate(settings):
            yield from _names(value, f"{name}[{place}]")


def settle(folder: Path, found: Sequence[Change], accepted: Collection[str]) -> list[Change]:
    """The differences from the run that made the checkpoint in `folder`, if they can be and are accepted.

    Raises:
        ValueError: one is neither.
    """
    never = [change for change in found if change.field in NEVER]
    if never:
        raise ValueError(
            f"resume: {folder} holds weights that do not fit; {joined(never)}; start another run in another output_dir"
        )
    refused = [
        change for change in found if ALL not in accepted and not any(within(change.field, one) for one in accepted)
    ]
    if refused:
        names = ",".join(dict.fromkeys([*accepted, *(change.field for change in refused)]))
        raise ValueError(
            f"resume: {folder} was made with another recipe; {joined(refused)}; "
            f"to go on with what is new, and with other bits from here on: --accept-changes {names}"
        )
    return list(found)
