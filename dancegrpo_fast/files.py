"""Files that appear whole or not at all, errors that name them, and their fingerprints."""

import errno
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PIECES, PIECE = 64, 1 << 20
CHUNK, BLOCK = 64 << 20, 1 << 20


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Around what writes a file or folder: an error of the system names it, and how much room a full disk has.

    Args:
        path: what is written.
        size: bytes, where known.

    Raises:
        OSError: with its `errno`, also for what safetensors raises in its place.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        full = number in (errno.ENOSPC, errno.EDQUOT)
        if number is None or (getattr(error, "filename", None) is not None and not full):
            raise
        reason = os.strerror(number)
        if full:
            folder = next(parent for parent in path.absolute().parents if parent.is_dir())
            wanted = "" if size is None else f"{size / 1e6:,.1f} MB to write, "
            reason = f"{reason}, {wanted}{shutil.disk_usage(folder).free / 1e6:,.1f} MB free"
        raise OSError(number, reason, str(path)) from error


@contextmanager
def replacing_file(path: Path, size: int | None = None) -> Iterator[Path]:
    """A file to write, which replaces `path` in one step, so that a crash leaves the old one or the new one.

    Raises:
        OSError: it cannot be written; it names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, size):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a crash leaves the old one or the new one.

    Raises:
        OSError: it cannot be written, and names it.
    """
    with replacing_file(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds JSON lines, on disk when this returns.

    Raises:
        OSError: they cannot be written; it names the file.
    """
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(target: Path, size: int | None = None) -> Iterator[Path]:
    """A folder to write into, which appears as `target` only when it is complete and on disk; else nothing stays.

    Raises:
        OSError: something cannot be written; it names `target`.
    """
    temporary, stale = (target.with_name(f".{target.name}.{end}") for end in (os.getpid(), "old"))
    with writing(target, size):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            readable = temporary.stat().st_mode & 0o666
            for path in (*temporary.rglob("*"), temporary):
                if path.is_file():
                    # Some releases of safetensors make files that only their owner can read.
                    path.chmod(readable)
                sync(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        # What was there, such as a checkpoint of a run that was continued elsewhere, leaves under another name.
        if target.exists():
            shutil.rmtree(stale, ignore_errors=True)
            os.replace(target, stale)
        os.replace(temporary, target)
        sync(target.parent)
        for left in leftovers(target.parent, re.escape(target.name)):
            shutil.rmtree(left, ignore_errors=True)


def leftovers(folder: Path, name: str) -> list[Path]:
    """Folders that `replacing` was writing there when it was killed, of targets whose whole name matches."""
    ours = re.compile(rf"\.(?:{name})\.(?:\d+|old)")
    return [path for path in folder.iterdir() if ours.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def sync(path: Path) -> None:
    """Puts a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def fingerprint(file: Path) -> str:
    """Of a small file's bytes; of a large file's size and evenly spaced pieces, since hashing 10 GB takes a minute."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for piece in range(PIECES):
            start = piece * PIECE if size <= PIECES * PIECE else piece * (size - PIECE) // (PIECES - 1)
            stream.seek(start)
            digest.update(stream.read(PIECE))
    return digest.hexdigest()


def checksum(file: Path, start: int) -> int:
    """CRC-32 of the chunk of `CHUNK` bytes that begins at `start`; threads take chunks at the same time."""
    found, left = 0, CHUNK
    with file.open("rb") as stream:
        stream.seek(start)
        while left > 0 and (block := stream.read(min(BLOCK, left))):
            found, left = zlib.crc32(block, found), left - len(block)
    return found


def sha256(file: Path) -> str:
    """Of a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
