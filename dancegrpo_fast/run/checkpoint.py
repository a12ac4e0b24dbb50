"""Checkpoints: safetensors and JSON, written beside and renamed, verified before they are loaded.

`<iteration>/` has `state.json` and, of each group of tensors, `<group>.safetensors`. Where processes hold shards, or a
group is larger than a file may be, it is a folder `<group>/` of `<process>-<number>.safetensors`, in the format of
torch.distributed.checkpoint's `HuggingFaceStorageReader`: each process writes its own shards, and reads its own again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..files import CHUNK, checksum, leftovers, replacing, sha256, sync, write_text, writing
from ..processes import Processes
from ..shards import is_shard, shard
from .stored import OFFSETS, Stored, read

FORMAT = 2  # 1 has SHA-256 of whole files, and none of state.json
FILE = 2 << 30  # bytes of a file, so that a process holds copies of no more
HEX = 8  # digits of a CRC-32
T = TypeVar("T")
Groups = Mapping[str, Mapping[str, Tensor]]


def save(
    root: Path, iteration: int, groups: Groups, state: Mapping[str, Any], processes: Processes | None = None
) -> Path:
    """Writes `root/<iteration>/`; with `processes` all of them have to call it, and each writes its shards.

    The folder appears under its name only when it is complete and on disk.

    Raises:
        OSError: one process cannot write, as on a full disk; what was written is removed.
    """
    target, is_main = root / f"{iteration:06d}", processes is None or processes.is_main
    size = sum(value.nbytes for group in groups.values() for value in group.values())
    with ExitStack() as stack:
        places = _agreed(processes, lambda: stack.enter_context(replacing(target, size)) if is_main else None)
        folder = next(place for place in places if place is not None)
        found: dict[str, dict[str, Any]] = {}
        for part in _agreed(processes, lambda: _write(folder, target, groups, processes)):
            found |= part
        if is_main:
            document = {"format": FORMAT, "iteration": iteration, "crc32": found, **state}
            write_text(folder / "state.json", json.dumps({**document, "digest": digest(document)}, indent=1))
    return target


def _agreed(processes: Processes | None, work: Callable[[], T]) -> list[T]:
    """What the work of each process gives, in each of them; where it fails in one, it does in all."""
    if processes is None or processes.count == 1:
        return [work()]
    outcome: tuple[T | None, OSError | None]
    try:
        outcome = work(), None
    except OSError as error:
        outcome = None, error
    outcomes: list[Any] = processes.collect([outcome])
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    return [found for found, _ in outcomes]


def _write(folder: Path, target: Path, groups: Groups, processes: Processes | None) -> dict[str, dict[str, Any]]:
    """Writes this process's part of every group; returns the checksums of its files by their names."""
    from safetensors.torch import save_file

    index = 0 if processes is None else processes.index
    found = {}
    for group, values in groups.items():
        batches = list(_batches({name: one for name, one in values.items() if index == 0 or is_shard(one)}))
        whole = len(batches) == 1 and not any(map(is_shard, values.values()))
        for number, batch in enumerate(batches):
            parts = {name: shard(value) for name, value in batch.items()}
            offsets = {name: {"saved_offsets": list(offset)} for name, (_, offset) in parts.items()}
            tensors = {name: part.detach().contiguous().cpu() for name, (part, _) in parts.items()}
            path = folder / (f"{group}.safetensors" if whole else f"{group}/{index:05d}-{number:05d}.safetensors")
            with writing(target, sum(part.nbytes for part in tensors.values())):
                path.parent.mkdir(exist_ok=True)
                save_file(tensors, path, None if whole else {OFFSETS: json.dumps(offsets)})
                sync(path)
            found[path.relative_to(folder).as_posix()] = _checksums(path, processes)
    return found


def _batches(values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    size = 0
    for name, value in values.items():
        more = shard(value)[0].nbytes
        if batch and size + more > FILE:
            yield batch
            batch, size = {}, 0
        # Not every process has a part of a tensor with few rows.
        if more or not is_shard(value):
            batch[name] = value
            size += more
    if batch:
        yield batch


def complete(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; half-written ones have other names and are not listed."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name.isdigit())


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what interrupted writes of some left behind; nothing else."""
    for path in complete(root)[:-keep]:
        # A link is somebody's who keeps it elsewhere.
        if not path.is_symlink():
            shutil.rmtree(path)
    for path in leftovers(root, r"\d+"):
        shutil.rmtree(path)


def _others(folder: Path) -> str:
    others = [path.name for path in complete(folder.parent) if path != folder]
    return f"; other checkpoints there: {', '.join(others) or 'none'}"


def load_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint, the file is damaged, or the folder has another iteration's name.
    """
    hint = _others(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"resume: {folder} is not a checkpoint, state.json is missing{hint}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"resume: {folder}/state.json is damaged: {error}{hint}") from error
    if not isinstance(state, dict) or state.get("format") not in (1, FORMAT):
        raise ValueError(f"resume: {folder} has another format, want {FORMAT}{hint}")
    if state["format"] == FORMAT and state.pop("digest", None) != digest(state):
        raise ValueError(f"resume: {folder}/state.json is damaged: it is not what was written{hint}")
    if folder.name.isdigit() and int(folder.name) != state["iteration"]:
        raise ValueError(f"resume: {folder} holds iteration {state['iteration']}, want the one of its name{hint}")
    return state


def digest(state: Mapping[str, Any]) -> str:
    """Of a state as JSON has it, with its keys in any order."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors, whole, and state of a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint, or a file of it is missing or damaged.
    """
    groups, state = stored(folder)
    return {group: {name: value[...] for name, value in values.items()} for group, values in groups.items()}, state


def stored(folder: Path, processes: Processes | None = None) -> tuple[dict[str, dict[str, Stored]], dict[str, Any]]:
    """Tensors of a checkpoint by group and name, not read yet, and its state.

    With `processes` all of them have to call it, and they share out the verification.

    Raises:
        ValueError: the folder is not a checkpoint, or a file of it is missing or damaged.
    """
    state = load_state(folder)
    recorded: Mapping[str, Any] = state["sha256"] if state["format"] == 1 else state["crc32"]
    bad = _damaged(folder, recorded, processes)
    for name in bad if processes is None else processes.collect(bad):
        reason = "damaged" if (folder / name).is_file() else "missing"
        raise ValueError(f"resume: {folder / name} is {reason}{_others(folder)}")
    groups: dict[str, dict[str, Stored]] = {}
    for name in recorded:
        read(folder / name, groups.setdefault(Path(name).parts[0].removesuffix(".safetensors"), {}))
    return groups, state


def _checksums(path: Path, processes: Processes | None) -> dict[str, Any]:
    size = path.stat().st_size
    with ThreadPoolExecutor(_threads(processes)) as pool:
        pieces = pool.map(lambda start: checksum(path, start), range(0, size, CHUNK))
        return {"bytes": size, "pieces": "".join(f"{one:0{HEX}x}" for one in pieces)}


def _damaged(folder: Path, recorded: Mapping[str, Any], processes: Processes | None) -> list[str]:
    """Names of files that are not as they were written, in this process's share of all their pieces."""

    def intact(name: str, start: int) -> bool:
        path, one = folder / name, recorded[name]
        if not path.is_file():
            return False
        if isinstance(one, str):
            return sha256(path) == one
        first = start // CHUNK * HEX
        return path.stat().st_size == one["bytes"] and checksum(path, start) == int(one["pieces"][first:][:HEX], 16)

    every = [
        (name, start)
        for name, one in recorded.items()
        for start in range(0, 1 if isinstance(one, str) else one["bytes"], CHUNK)
    ]
    mine = every if processes is None else every[processes.index :: processes.count]
    with ThreadPoolExecutor(_threads(processes)) as pool:
        found = list(pool.map(lambda piece: intact(*piece), mine))
    return [name for (name, _), good in zip(mine, found, strict=True) if not good]


def _threads(processes: Processes | None) -> int:
    return len(os.sched_getaffinity(0)) if processes is None else processes.threads()
