"""Checkpoints: safetensors and JSON, written beside and renamed, verified before they are loaded."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import leftovers, replacing, write_text

FORMAT = 1


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save(root: Path, iteration: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Writes `root/<iteration>/` with one safetensors file per entry of `tensors` and `state.json`.

    The folder appears under its name only when it is complete and on disk.

    Raises:
        OSError: it cannot be written, as on a full disk; what was written of it is removed.
    """
    from safetensors.torch import save_file

    target = root / f"{iteration:06d}"
    size = sum(value.nbytes for group in tensors.values() for value in group.values())
    digests = {}
    with replacing(target, size) as folder:
        for name, group in tensors.items():
            path = folder / f"{name}.safetensors"
            save_file({key: value.detach().contiguous().cpu() for key, value in group.items()}, path)
            digests[path.name] = _digest(path)
        document = {"format": FORMAT, "iteration": iteration, "sha256": digests, **state}
        write_text(folder / "state.json", json.dumps(document, indent=1))
    return target


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
        ValueError: the folder is not a checkpoint, or the file is damaged.
    """
    hint = _others(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"resume: {folder} is not a checkpoint, state.json is missing{hint}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"resume: {folder}/state.json is damaged: {error}{hint}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"resume: {folder} has another format, want {FORMAT}{hint}")
    return state


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors and state of a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint, or a file of it is missing or damaged.
    """
    from safetensors.torch import load_file

    state, tensors = load_state(folder), {}
    for name, digest in state["sha256"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise ValueError(f"resume: {path} is {'damaged' if path.is_file() else 'missing'}{_others(folder)}")
        tensors[path.stem] = load_file(path)
    return tensors, state
