"""`dancegrpo-fast recipes`: lists the recipes that the package brings, and copies one with its prompts."""

import re
import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes"


def main(arguments: Sequence[str]) -> None:
    """Lists, or copies."""
    parser = ArgumentParser(prog="dancegrpo-fast recipes", description="Lists the recipes that the package brings.")
    copying = parser.add_subparsers(dest="command").add_parser(
        "copy", help="copies one, with its prompts, into FOLDER/recipes; it runs from FOLDER"
    )
    copying.add_argument("name")
    copying.add_argument("folder", nargs="?", type=Path, default=Path(), help="the working folder, if not this one")
    given = parser.parse_args(arguments)
    if given.command is None:
        lines = [textwrap.fill(about(n), 110, initial_indent=f"{n:26}", subsequent_indent=" " * 26) for n in names()]
        print("\n".join(lines))
        return
    written = copy(given.name, given.folder)
    for path in written:
        print(f"wrote {path}")
    if not written:
        print(f"{given.folder / 'recipes' / given.name}.yaml is there already, with all that it needs beside it")
    text = (FOLDER / f"{given.name}.yaml").read_text(encoding="utf-8")
    base = re.search(r"^# The base: (.*)$", text, re.MULTILINE)
    print(f"in {given.folder.resolve()}:")
    print(f"  {base[1]}" if base else "  what it needs is said at its top")
    print(f"  dancegrpo-fast train recipes/{given.name}.yaml")


def names() -> list[str]:
    """Of the recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def about(name: str) -> str:
    """The first sentence of a recipe's comment."""
    comment = re.match(r"(?:#.*\n)+", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    words = " ".join(comment[0].replace("#", " ").split()) if comment else ""
    return re.split(r"(?<=\.) ", words)[0]


def copy(name: str, folder: Path) -> list[Path]:
    """Copies a recipe, and the files beside it that it names, into `folder/recipes`, as they lie in the repository.

    Returns:
        What was written; files that are there already as they are here are left alone.

    Raises:
        ValueError: no such recipe, or another file where one of its own belongs; nothing is written then.
    """
    if name not in names():
        raise ValueError(f'name: got "{name}", want one of {", ".join(names())}')
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: got {folder}, which is a file")
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    wanted = {f"{name}.yaml", *re.findall(r"(?:\brecipes/)?\b(prompts/[\w.]+|README\.md)", text)}
    contents = {folder / "recipes" / part: (FOLDER / part).read_bytes() for part in sorted(wanted)}
    new = {path: content for path, content in contents.items() if not path.exists()}
    for path in contents.keys() - new.keys():
        if not path.is_file() or path.read_bytes() != contents[path]:
            raise ValueError(f"folder: got {folder}, where {path} is another file, want it moved, or another folder")
    for path, content in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(new)
