"""Recipes from YAML files and the command line."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .whole import Recipe

# Of commands' own options.
HELP = {
    "resume": "auto, or the folder of a checkpoint",
    "accept_changes": "fields that may differ from the run that is resumed, with commas between them, or all",
    "iterations": "how many are measured, after one that is not",
    "figures": "draws them into this folder",
}


def load_recipe(arguments: Sequence[str], command: str = "train", **options: str | None) -> tuple[Recipe, Any]:
    """A recipe file with overrides, and the command's own options.

    Args:
        arguments: the recipe's path, then `--field.name value` overrides.
        command: of this program.
        options: the command's own, with their defaults.

    Raises:
        ValueError: a missing file, an unknown field, or a value of the wrong type or range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    usage = f"dancegrpo-fast {command} RECIPE.yaml [--FIELD VALUE ...]"
    parser = ArgumentParser(usage, usage=usage, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="the recipe")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=str | None, default=default, help=HELP.get(name))
    parser.add_class_arguments(Recipe, None)
    path = Path(arguments[0])
    if not path.is_file() and arguments[0] not in ("-h", "--help"):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"recipe: got {path}, which {what}; want a YAML file")
    overrides = _replacing_lists(arguments[1:])
    given = list(arguments) if arguments[0] in ("-h", "--help") else ["--config", str(path), *overrides]
    try:
        if path.is_file():
            _check_keys(path)
        namespace = parser.parse_args(given)
        found = {name: namespace.pop(name) for name in options}
        namespace.pop("config", None)
        return Recipe(**vars(parser.instantiate(namespace))), found
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe: got {path}, want UTF-8: {error}") from error
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"recipe: {path}: {_reason(error)}") from error
    except ValueError as error:
        raise ValueError(_reason(error)) from error


def _replacing_lists(overrides: Sequence[str]) -> list[str]:
    """The same, with an empty list of rewards before each; jsonargparse would merge two of equal length by item."""
    found: list[str] = []
    for one in overrides:
        name = one.partition("=")[0]
        if name in ("--rewards", "--evaluation.rewards"):
            found.append(f"{name}=[]")
        found.append(one)
    return found


def _check_keys(path: Path) -> None:
    """Raises ValueError for a key that stands twice in one mapping, of which YAML would take the last."""
    import yaml

    try:
        waiting = [yaml.compose(path.read_text(encoding="utf-8-sig"))]
    except yaml.YAMLError:
        # The parser says it.
        return
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                # A key may be a list.
                if (name := str(key.value)) in lines:
                    raise ValueError(f"recipe: {path} line {line}: got {name} as in line {lines[name]}, want it once")
                lines[name] = line
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _reason(error: Exception) -> str:
    """What jsonargparse says, without the types that it tried and the whole of what it was given."""
    frame = ("Does not validate", "Subtypes:", "Errors:", "Problem with given class_path", "Given value")
    # One value of one type.
    found = re.fullmatch(r'Parser key "(.+)":\s*Expected an? (.+)\. Got value: (.*)', str(error))
    if found:
        wanted = re.sub(r"<class '(\w+)'>|typing\.", r"\1", found[2])
        return f"{found[1]}: got {found[3]}, want {wanted}"
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    return " ".join(line for line in lines if not line.startswith((*frame, "Expected a <class 'NoneType'>")))
