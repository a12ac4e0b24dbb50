"""A results file, one JSON object a line, each written when it is known; and tables for readers."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows of a file, none where there is no file; a line that was cut off when its writer was ended is left out."""
    found: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    """All of a file, in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add(path: Path | None, rows: Iterable[Row]) -> None:
    """To the end of a file, all at once; to none where there is no path."""
    if path is not None:
        with path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def drop(path: Path, mine: Callable[[Row], bool]) -> None:
    """Rows of a file that are to be made again."""
    if path.exists():
        write(path, [row for row in read(path) if not mine(row)])


def made_with(row: Row) -> str:
    """A line of a page: versions, commit and day."""
    where = row["environment"]
    packages = ", ".join(f"{name} {where[name]}" for name in ("torch", "diffusers", "peft") if name in where)
    return f"{packages}, revision {where['git']}, {where['date'][:10]}."


def grid(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]
