"""Prompt files: `.txt` (one a line), `.jsonl`, `.parquet`; every column beside the prompt goes to the rewards.

A path in an `image` column is relative to the prompt file and made absolute.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .rng import generator

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """One prompt and its other columns."""

    text: str
    meta: Mapping[str, Any]


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError(
                f'prompts: got {path}, want pyarrow installed (pip install "dancegrpo_fast[train]")'
            ) from error
        try:
            rows = parquet.read_table(path).to_pylist()
        except (ArrowException, OSError) as error:
            raise ValueError(f"prompts: got {path}, want a parquet file that can be read: {error}") from error
        yield from rows
        return
    try:
        text = path.read_text(encoding="utf-8")
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
        except json.JSONDecodeError as error:
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
        ValueError: missing, empty or unreadable file, or a row without a `prompt` (or `caption`) text.
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
