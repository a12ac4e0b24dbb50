"""The rows of one prompt file, by how its name ends."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..install import install_line

# Columns that a prompt is taken from, in this order, whatever their case.
PROMPT_COLUMNS = ("prompt", "caption", "text")

Row = Mapping[str, Any]


def prompt_column(row: Row) -> str | None:
    """The first of `PROMPT_COLUMNS` that the row has, as it is written there."""
    names: dict[str, str] = {}
    for name, value in row.items():
        if value is not None:
            names.setdefault(name.lower(), name)
    return next((names[name] for name in PROMPT_COLUMNS if name in names), None)


def _text(path: Path) -> str:
    try:
        # With a byte order mark or without; line ends stay as they are.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: got {path}, want UTF-8: {error}") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not `splitlines`, which also ends lines at characters that a prompt may have, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _txt(path: Path) -> Iterator[Row]:
    for _, line in _lines(_text(path)):
        yield {"prompt": line}


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(_text(path)):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"prompts: {path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"prompts: {path} line {number} is {type(row).__name__}, want an object")
        yield row


def _json(path: Path) -> Iterator[Row]:
    """A list of rows or of texts, columns by name, rows by name, or lines as in `.jsonl`."""
    text = _text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _jsonl(path)
            return
        raise ValueError(f"prompts: {path} is not JSON: {error}") from error
    if isinstance(found, dict):
        found = _of_object(path, found)
    if not isinstance(found, list):
        raise ValueError(f"prompts: {path} is {type(found).__name__}, want a list or an object")
    for number, row in enumerate(found, start=1):
        if not isinstance(row, (str, dict)):
            raise ValueError(f"prompts: {path} row {number} is {type(row).__name__}, want a text or an object")
        yield {"prompt": row} if isinstance(row, str) else row


def _of_object(path: Path, found: dict[str, Any]) -> list[Any]:
    column = prompt_column(found)
    if column is None:
        return list(found.values())
    kind = type(found[column])
    if kind is str:
        return [found]
    # Lists, or what pandas writes: values by the row's name.
    whole = kind in (list, dict) and all(isinstance(values, kind) for values in found.values())
    keys = {tuple(values) if kind is dict else len(values) for values in found.values()} if whole else set()
    if len(keys) != 1:
        raise ValueError(f"prompts: {path} has the columns {sorted(found)}, want lists of one length")
    columns = [list(values.values()) if kind is dict else values for values in found.values()]
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


def _separated(path: Path) -> Iterator[Row]:
    """Cells are text as they are in the file, empty ones null."""
    # Pictures in cells are longer than what is allowed by default.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        text = io.StringIO(_text(path), newline="")
        names, *rows = csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"prompts: got {path}, want lines of cells that can be read: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if len(set(names)) != len(names):
        raise ValueError(f"prompts: {path} has the columns {names}, want each one once")
    for number, cells in enumerate(rows, start=1):
        if cells and len(cells) != len(names):
            raise ValueError(
                f"prompts: {path} row {number} has {len(cells)} cells, want {len(names)} as the first line has; a text "
                "with a comma stands in double quotes"
            )
        if any(cells):
            yield dict(zip(names, (cell or None for cell in cells), strict=True))


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    # Of this file alone: folders named like `split=train` are no columns.
    return _of_table(path, parquet.ParquetFile(path).read())


def _arrow(path: Path) -> Iterator[Row]:
    """As Hugging Face's `save_to_disk` writes it, a stream, or a file of Arrow's own format."""
    from pyarrow import ArrowInvalid, ipc

    try:
        return _of_table(path, ipc.open_stream(path.read_bytes()).read_all())
    except ArrowInvalid:
        return _of_table(path, ipc.open_file(path.read_bytes()).read_all())


def _of_table(path: Path, table: Any) -> Iterator[Row]:
    columns = [_values(path, name, column) for name, column in zip(table.column_names, table.columns, strict=True)]
    return (dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(path: Path, name: str, column: Any) -> Sequence[Any]:
    """Of an Arrow column, in Python; times that Python cannot hold as text."""
    from pyarrow import ArrowException, string

    failed = (ArrowException, ValueError, OverflowError, LookupError)
    # Whole microseconds are Python's own times, with and without pandas.
    kinds = [_in_microseconds(column.type), string()]
    for kind in kinds:
        try:
            values: Sequence[Any] = column.cast(kind).to_pylist()
            return values
        except failed as error:
            reason = error
    raise ValueError(f'prompts: {path} column "{name}" cannot be read: {reason}') from reason


def _in_microseconds(kind: Any) -> Any:
    import pyarrow

    if getattr(kind, "unit", None) != "ns":
        return kind
    if pyarrow.types.is_timestamp(kind):
        return pyarrow.timestamp("us", kind.tz)
    return pyarrow.time64("us") if pyarrow.types.is_time(kind) else pyarrow.duration("us")


def _needs_pyarrow(read: Callable[[Path], Iterator[Row]]) -> Callable[[Path], Iterator[Row]]:
    def checked(path: Path) -> Iterator[Row]:
        try:
            from pyarrow import ArrowException
        except ImportError as error:
            raise ValueError(f"prompts: got {path}, want pyarrow installed ({install_line('train')})") from error
        try:
            return read(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"prompts: got {path}, want a table that can be read: {error}") from error

    return checked


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _needs_pyarrow(_parquet),
    ".arrow": _needs_pyarrow(_arrow),
}
