"""Prompt embeddings on disk, made once per model and prompt, read row by row.

A store is a folder: `identity.json` says what made the rows, and each shard, of at most a thousand prompts and a GiB,
is `<name>.safetensors` (one row per prompt in every tensor) with `<name>.json`, the list of their texts.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import fingerprint, replacing_file, write_text
from ..processes import share

FORMAT = 1
SHARD, SHARD_BYTES = 1000, 1 << 30
# Seconds after which a network file system shows what another host wrote.
SEEN_AFTER = 90
# Weight files are told apart by their size and by this many pieces of this many bytes.

Identity = Mapping[str, Any]
EncodeOne = Callable[[str], Mapping[str, Tensor]]


def text_identity(
    family: str,
    folder: Path,
    parts: Iterable[str],
    max_text_tokens: int | None,
    dtype: torch.dtype,
    stored: torch.dtype,
    quantization: str | None = None,
) -> Identity:
    """What the embeddings of a model folder depend on.

    Args:
        family: of the model.
        folder: a diffusers folder.
        parts: its subfolders of text encoders and tokenizers, whose files are fingerprinted.
        max_text_tokens: as set; None is the pipeline's own.
        dtype: of the text encoders.
        stored: of the embeddings.
        quantization: of the text encoders; None: none.
    """
    files = sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file())
    # Stores that are there know of none.
    fewer_bits = {} if quantization is None else {"quantization": quantization}
    return {
        **fewer_bits,
        "format": FORMAT,
        "family": family,
        "dtype": str(dtype).removeprefix("torch."),
        "stored": str(stored).removeprefix("torch."),
        "max_text_tokens": max_text_tokens,
        "files": {file.relative_to(folder).as_posix(): fingerprint(file) for file in files},
    }


def given_identity(family: str) -> Identity:
    """Of embeddings that come with a model folder which has no text encoders."""
    return {"format": FORMAT, "family": family, "given": True}


def cache_folder(root: Path, identity: Identity) -> Path:
    """`<root>/<family>-<digest of the identity>`."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return root / f"{identity['family']}-{digest[:16]}"


def _rows_of_a_shard(row: Mapping[str, Tensor]) -> int:
    return max(1, min(SHARD, SHARD_BYTES // sum(value.nbytes for value in row.values())))


class PromptStore:
    """A folder of prompt embeddings, created where there is none.

    Shards are named by their texts and appear whole, so that a crash loses at most the shard being made, and
    processes which write the same folder cannot harm each other.

    Args:
        folder: of the store.
        identity: what its rows are made from.

    Raises:
        ValueError: the folder was made from something else, is no store, or holds a damaged file.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder = folder
        self._rows: dict[str, tuple[Any, int]] = {}
        self._names: frozenset[str] | None = None
        self._shards: set[str] = set()
        if not folder.is_dir() or not any(folder.iterdir()):
            self._create(identity)
        found = self._read(folder / "identity.json")
        if found != identity:
            keys = found.keys() | identity.keys() if isinstance(found, dict) else set()
            different = sorted(key for key in keys if found.get(key) != identity.get(key))
            raise ValueError(f"prompt embeddings: got {folder}, made from another model or settings ({different})")
        self._scan()

    def _create(self, identity: Identity) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        # mkdtemp makes folders that only their owner can read.
        made.chmod(self.folder.parent.stat().st_mode & 0o777)
        try:
            write_text(made / "identity.json", json.dumps(identity, indent=1, sort_keys=True))
            os.rename(made, self.folder)
        except OSError:
            # Another process was first; a folder with something in it cannot be replaced.
            shutil.rmtree(made)
            if not self.folder.is_dir():
                raise

    def _damaged(self, file: Path, reason: object) -> ValueError:
        return ValueError(
            f"prompt embeddings: got the damaged file {file} ({reason}); want it whole, or {self.folder} made again"
        )

    def _read(self, file: Path) -> Any:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"prompt embeddings: got {self.folder}, want a folder with {file.name} in it") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._damaged(file, error) from error

    def _scan(self) -> None:
        """Takes up the shards that are new. The list of texts is written last: without it a shard is not there."""
        from safetensors import SafetensorError, safe_open

        for file in sorted(self.folder.glob("*.json")):
            if file.name == "identity.json" or file.stem in self._shards:
                continue
            texts, data = self._read(file), file.with_suffix(".safetensors")
            try:
                handle = safe_open(data, framework="pt")
                lengths = {name: handle.get_slice(name).get_shape()[0] for name in handle.keys()}  # noqa: SIM118  # not a mapping
            except (SafetensorError, OSError, IndexError) as error:
                raise self._damaged(data, error) from error
            if not isinstance(texts, list) or not lengths or set(lengths.values()) != {len(texts)}:
                raise self._damaged(data, f"rows {lengths}, and another number of texts")
            names = frozenset(lengths)
            if self._names not in (None, names):
                raise self._damaged(data, f"tensors {sorted(names)}, and others in the files beside it")
            self._names = names
            self._shards.add(file.stem)
            for row, text in enumerate(texts):
                self._rows.setdefault(text, (handle, row))

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The texts without a row, each once."""
        self._scan()
        return [text for text in dict.fromkeys(texts) if text not in self._rows]

    def add(self, texts: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Writes rows `[len(texts), ...]` of every tensor."""
        from safetensors.torch import save_file

        rows = _rows_of_a_shard({name: value[:1] for name, value in tensors.items()}) if texts else 1
        for start in range(0, len(texts), rows):
            part = slice(start, start + rows)
            document = json.dumps(list(texts[part]))
            name = hashlib.sha256(document.encode()).hexdigest()[:16]
            rows_of = {key: value[part].contiguous().cpu() for key, value in tensors.items()}
            size = sum(value.nbytes for value in rows_of.values())
            with replacing_file(self.folder / f"{name}.safetensors", size) as temporary:
                save_file(rows_of, temporary)
                # Some releases of safetensors make files that only their owner can read.
                temporary.chmod(self.folder.stat().st_mode & 0o666)
            write_text(self.folder / f"{name}.json", document)
        self._scan()

    def encode(self, texts: Iterable[str], load: Callable[[], EncodeOne]) -> None:
        """Makes the rows that are missing, each process a share of them; afterwards every process has all.

        Args:
            texts: of the run, the same in every process.
            load: called where something is missing, gives a function from a text to its tensors `[1, ...]`. What it
                loaded is freed afterwards.

        Raises:
            ValueError: the processes do not share the folder.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        state, wanted = PartialState(), list(dict.fromkeys(texts))
        # As the first process sees them, before any process writes.
        (missing,) = broadcast_object_list([self.missing(wanted)])
        mine = share(len(missing), state.process_index, state.num_processes)
        if mine:
            self._make(missing[mine.start : mine.stop], load)
        state.wait_for_everyone()
        self._see(wanted)

    def _make(self, texts: Sequence[str], load: Callable[[], EncodeOne]) -> None:
        from accelerate.utils.memory import clear_device_cache

        encode, made, rows = load(), 0, []
        for text in texts:
            # One by one: in a batch, a matrix product may give a row other bits.
            rows.append({name: value.cpu() for name, value in encode(text).items()})
            last = made + len(rows)
            if len(rows) == _rows_of_a_shard(rows[0]) or last == len(texts):
                self.add(texts[made:last], {name: torch.cat([row[name] for row in rows]) for name in rows[0]})
                made, rows = last, []
                print(f"encoded {made} of {len(texts)} prompts into {self.folder}", flush=True)
        del encode
        clear_device_cache(garbage_collection=True)

    def _see(self, texts: Sequence[str]) -> None:
        """Takes up what other processes wrote."""
        for _ in range(SEEN_AFTER):
            if not self.missing(texts):
                return
            time.sleep(1)
        raise ValueError(f"model.prompt_cache: got {self.folder}, want a folder that all processes share")

    def check(self, texts: Iterable[str]) -> None:
        """Raises ValueError for a text that is not in the store."""
        for text in texts:
            if text not in self._rows:
                raise ValueError(f'prompts: got "{text}", want one with embeddings in {self.folder}')

    def rows(self, texts: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
        """Rows of the texts, of the named tensors, on the CPU.

        Raises:
            ValueError: a text or a tensor that is not in the store.
        """
        if self._names is not None and not self._names.issuperset(names):
            raise ValueError(
                f"prompt embeddings: got {sorted(self._names)} in {self.folder}, want {list(names)} among them"
            )
        self.check(texts)
        found = [self._rows[text] for text in texts]
        return {name: torch.cat([shard.get_slice(name)[row : row + 1] for shard, row in found]) for name in names}
