"""Prompts from files and folders."""

from collections.abc import Iterator
from pathlib import Path

from .folders import METADATA, files_of
from .formats import PROMPT_COLUMNS, READERS, Row, prompt_column
from .images import located
from .prompt import Prompt, check_text


def load_prompts(path: str | Path, split: str = "train") -> list[Prompt]:
    """Prompts of a file, or of one split in a folder; every column beside the prompt goes to the rewards.

    The prompt is the `prompt`, else the `caption`, else the `text` of a row, whatever their case. A path in an `image`
    column is relative to its file and made absolute. In an image folder's `metadata.*`, `file_name` is that column.

    Args:
        path: a file of `READERS`, or a folder as `files_of` looks through it.
        split: "train" or "test", of a folder.

    Raises:
        ValueError: missing, empty or unreadable file, or a row without a prompt that can be encoded.
    """
    source = Path(path)
    files = files_of(source, split) if source.is_dir() else [source]
    prompts = [prompt for file in files for prompt in _prompts(file)]
    if not prompts:
        raise ValueError(f"prompts: {source} holds no prompts, want at least one")
    return prompts


def _prompts(file: Path) -> Iterator[Prompt]:
    if not file.is_file():
        raise ValueError(f"prompts: got {file}, which does not exist; want a file or folder of prompts")
    if file.suffix not in READERS:
        raise ValueError(f'prompts: got a "{file.suffix}" file ({file}), want one of {tuple(READERS)}')
    for number, row in enumerate(READERS[file.suffix](file), start=1):
        text = _text(f"prompts: {file} row {number}", row)
        meta = {name: value for name, value in row.items() if name.lower() != "prompt"}
        if file.stem == METADATA and "image" not in meta and "file_name" in meta:
            meta["image"] = meta["file_name"]
        if "image" in meta:
            meta["image"] = located(meta["image"], file.parent)
        yield Prompt(text, meta)


def _text(name: str, row: Row) -> str:
    column = prompt_column(row)
    text = None if column is None else row[column]
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str) or not text.strip():
        wanted = " or ".join(f"`{one}`" for one in PROMPT_COLUMNS)
        got = f"has {sorted(row)}" if column is None else f"has {_shown(text)} as `{column}`"
        raise ValueError(f"{name} {got}, want a text as {wanted}")
    check_text(name, text)
    return text


def _shown(value: object) -> str:
    """A value that is no prompt, in few words."""
    return f"a list of {len(value)}" if isinstance(value, list) else f"{type(value).__name__} {str(value)[:40]!r}"
