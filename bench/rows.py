"""A results file: one JSON object a line, each written when it is known."""

import json
from collections.abc import Callable, Iterable
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


class Rows:
    """Writes to one file; rows of other programs in it are kept.

    Args:
        path: the file, None for nowhere.
        mine: whether a row there is of this program. Such rows are replaced.
        resume: they are kept as well, and their cases are in `done`.
        append: the file is not looked at, as others write to it at the same time.
    """

    def __init__(
        self, path: Path | None, mine: Callable[[Row], bool], resume: bool = False, *, append: bool = False
    ) -> None:
        self.path = path
        self.written: list[Row] = []
        self.done: set[str] = set()
        if path is None or append:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read(path) if resume or not mine(row)]
        if resume:
            self.done = {row["case"] for row in kept if mine(row)}
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def add(self, case: str, rows: Iterable[Row]) -> None:
        """All rows of one case at once, so that a case in the file is whole."""
        new = [{"case": case, **row} for row in rows]
        self.written += new
        if self.path is not None:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in new))
