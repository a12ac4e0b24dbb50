"""Prompt files: `.txt` (one a line), `.jsonl`, `.parquet`; every column beside the prompt goes to the rewards.

A path in an `image` column is relative to the prompt file and made absolute.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import torch

from .install import install_line
from .rng import generator

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """One prompt and its other columns."""

    text: str
    meta: Mapping[str, Any]

    def columns(self) -> dict[str, Any]:
        """`meta` as JSON holds it, which is how it is written and compared: times and decimals as text, durations in
        seconds, bytes by their SHA-256, numbers that are not finite as null.

        Raises:
            ValueError: a value of another kind.
        """
        found = {}
        for name, value in self.meta.items():
            try:
                found[name] = _plain(value)
            except TypeError as error:
                raise ValueError(
                    f'prompts: got {error} in column "{name}" of "{self.text}", want plain values'
                ) from error
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()}"
    # Of numpy, and tensors.
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"a {type(value).__name__}")


def check_text(name: str, text: str) -> None:
    """Raises ValueError, which begins with `name`, for a text that no tokenizer should be given."""
    found = re.search("[\0\ud800-\udfff]", text)
    if found:
        kind = "a null character" if found[0] == "\0" else "half of a surrogate pair"
        start = max(0, found.start() - 40)
        shown = ascii(text[start : start + 80])
        raise ValueError(f"{name}: got {shown} with {kind} at character {found.start()}, want text as UTF-8 has it")


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError(f"prompts: got {path}, want pyarrow installed ({install_line('train')})") from error
        try:
            table = parquet.read_table(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"prompts: got {path}, want a parquet file that can be read: {error}") from error
        columns = []
        for name in table.column_names:
            try:
                columns.append(table.column(name).to_pylist())
            except (ArrowException, ValueError, OverflowError, LookupError) as error:
                raise ValueError(f'prompts: {path} column "{name}" cannot be read: {error}') from error
        yield from (dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True))
        return
    try:
        # With a byte order mark or without.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: got {path}, want UTF-8: {error}") from error
    # Not `splitlines`, which also ends lines at characters that a prompt may have, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield {"prompt": line.strip()}
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"prompts: {path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"prompts: {path} line {number} is {type(row).__name__}, want an object")
        yield row


def load_prompts(path: str | Path, split: str = "train") -> list[Prompt]:
    """Prompts of a file, or of `<split>.*` in a folder.

    Args:
        path: a `.txt`, `.jsonl` or `.parquet` file, or a folder that holds `train.*` / `test.*`.
        split: which of them.

    Raises:
        ValueError: missing, empty or unreadable file, or a row without a `prompt` (or `caption`) text that can be
            encoded.
    """
    source = Path(path)
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.stem == split and p.suffix in SUFFIXES)
        if len(found) != 1:
            raise ValueError(f"prompts: got {len(found)} files {split}.* in {source}, want one of {SUFFIXES}")
        source = found[0]
    if not source.is_file():
        raise ValueError(f"prompts: got {source}, which does not exist; want a file or folder of prompts")
    if source.suffix not in SUFFIXES:
        raise ValueError(f'prompts: got a "{source.suffix}" file ({source}), want one of {SUFFIXES}')
    prompts = []
    for number, row in enumerate(_rows(source), start=1):
        text = row.get("prompt", row.get("caption"))
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompts: {source} row {number} has {sorted(row)}, want a text `prompt` (or `caption`)")
        check_text(f"prompts: {source} row {number}", text)
        meta = {k: v for k, v in row.items() if k != "prompt"}
        if isinstance(meta.get("image"), str):
            meta["image"] = str((source.parent / meta["image"]).resolve())
        prompts.append(Prompt(text, meta))
    if not prompts:
        raise ValueError(f"prompts: {source} holds no prompts, want at least one")
    return prompts


def prompts_of_iteration(prompts: Sequence[Prompt], count: int, iteration: int, seed: int) -> list[Prompt]:
    """The prompts of one iteration: every epoch is its own permutation, and epochs follow each other without a gap."""
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
        chosen.append(prompts[orders[epoch][place]])
    return chosen


def prompts_of_run(prompts: Sequence[Prompt], count: int, iterations: int, seed: int) -> list[Prompt]:
    """The prompts of the first `iterations` iterations, each once, in the order in which they come up."""
    # The first epoch has every prompt once.
    return prompts_of_iteration(prompts, min(count * iterations, len(prompts)), 0, seed)
