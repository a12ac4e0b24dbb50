"""The files of a folder that hold one split, as people lay them out and as `datasets` writes and reads them."""

import json
import re
from pathlib import Path

from .formats import READERS

SHARD = r"{split}-(\d{{5}})-of-(\d{{5}})"
METADATA = "metadata"


def files_of(folder: Path, split: str) -> list[Path]:
    """The files of a split, in the order of its rows.

    The first of these that is there:

    - what `Dataset.save_to_disk` wrote, into the folder or its `<split>/`;
    - `<split>.*`, `<split>_metadata.*` or the shards `<split>-00000-of-00003.*`, in the folder or its `data/`;
    - `metadata.*` of an image folder, or numbered files, in `<split>/`;
    - for "train", `metadata.*` in the folder itself.

    Raises:
        ValueError: none of them, several, or shards that are missing.
    """
    for place in (folder, folder / split):
        if (place / "state.json").is_file():
            return _saved(place)
    for found in (_named(folder, split), _inside(folder / split), _metadata(folder) if split == "train" else []):
        if len(found) == 1:
            return found[0]
        if found:
            break
    names = ", ".join(files[0].relative_to(folder).as_posix() for files in found)
    raise ValueError(
        f"prompts: got {len(found)} files {split}.* in {folder}{names and f' ({names})'}, want one that ends in "
        f"{', '.join(READERS)}, or a folder as Hugging Face's `datasets` writes it"
    )


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.suffix in READERS and path.is_file()]


def _named(folder: Path, split: str) -> list[list[Path]]:
    found = []
    for place in (folder, folder / "data"):
        files = _files(place)
        found += [[path] for path in files if path.stem in (split, f"{split}_{METADATA}")]
        shards = [path for path in files if re.fullmatch(SHARD.format(split=re.escape(split)), path.stem)]
        found += [_complete(place, split, shards)] if shards else []
    return found


def _inside(folder: Path) -> list[list[Path]]:
    numbered = [path for path in _files(folder) if path.stem.isdecimal()]
    return _metadata(folder) or ([numbered] if numbered else [])


def _metadata(folder: Path) -> list[list[Path]]:
    return [[path] for path in _files(folder) if path.stem == METADATA]


def _complete(folder: Path, split: str, shards: list[Path]) -> list[Path]:
    """Shards, if they are all there."""
    count = int(shards[0].stem[-5:])
    wanted = [f"{split}-{number:05d}-of-{count:05d}{shards[0].suffix}" for number in range(count)]
    if [path.name for path in shards] != wanted:
        names = {path.name for path in shards}
        lost = [name for name in wanted if name not in names]
        what = f"without {lost[0]}" if lost else f"beside {sorted(names - set(wanted))[0]}"
        raise ValueError(f"prompts: got shards of {folder} {what}, want all {count} of one set")
    return shards


def _saved(folder: Path) -> list[Path]:
    """What `Dataset.save_to_disk` wrote."""
    try:
        files = [
            folder / str(one["filename"]) for one in json.loads((folder / "state.json").read_bytes())["_data_files"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prompts: got {folder / 'state.json'}, want it as save_to_disk writes it: {error!r}"
        ) from error
    if lost := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"prompts: got {folder} without {lost[0]}, want all files that its state.json names")
    return files
