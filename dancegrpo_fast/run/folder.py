"""The directory of a run."""

import atexit
import errno
import fcntl
import json
import math
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from .. import files
from . import checkpoint

# What a lock says that another process has.
HELD = (errno.EACCES, errno.EAGAIN)
# A process gives a lock up when it closes any handle of the file; so each is opened once and kept to the end.
_held: dict[Path, TextIO] = {}


# In a saved model: after which iteration.
SAVED = "saved.json"


def _leave(handle: TextIO) -> None:
    handle.truncate(0)
    handle.close()


@dataclass(frozen=True)
class _Holder:
    """Who is in a folder."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def this(cls) -> "_Holder":
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(" ", "seconds"))

    @classmethod
    def read(cls, text: str) -> "_Holder | None":
        """None where nobody is, or a crash has left a part of it."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def may_live(self) -> bool:
        """Whether it is there, as far as this host can tell."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        # A container that starts again gives its processes the same numbers.
        return self.pid != os.getpid()


class RunDirectory:
    """Where a run writes: `metrics.jsonl`, `evaluations.jsonl`, `checkpoints/`, `samples/`, `model/`.

    Raises:
        ValueError: `root` is a file.
    """

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise ValueError(f"output_dir: got {root}, which is a file, want a folder")
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.metrics = root / "metrics.jsonl"
        self.evaluations = root / "evaluations.jsonl"

    def claim(self) -> str | None:
        """Makes the folder and keeps other processes out for as long as this one lives; why not, if one is in it.

        The system gives the lock up with the process. Where a file system has no locks, what is written in the file
        decides; a process that was killed on another host then keeps everyone out until someone removes the file.
        """
        path = self.root.resolve() / ".lock"
        if path in _held:
            return None
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+", encoding="utf-8")
        handle.seek(0)
        holder, taken = _Holder.read(handle.read()), f"output_dir: got {self.root}, where a run is going on"
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD or (holder is not None and holder.may_live()):
                handle.close()
                remove = "" if error.errno in HELD else f"; if that has ended, remove {path}"
                return f"{taken}{'' if holder is None else f': {holder}'}{remove}"
        with files.writing(path):
            handle.truncate(0)
            handle.write(json.dumps(asdict(_Holder.this())))
            handle.flush()
        atexit.register(_leave, handle)
        _held[path] = handle
        return None

    def evaluated(self, iteration: int) -> set[str]:
        """The samplers of which `evaluations.jsonl` has a row of this iteration."""
        lines = self.evaluations.read_text(encoding="utf-8").splitlines() if self.evaluations.is_file() else []
        return {row["sampler"] for row in map(json.loads, lines) if row["iteration"] == iteration}

    def saved(self, name: str) -> int | None:
        """The iteration after which the model of this name was saved; None where it was not, or that is unknown."""
        try:
            return int(json.loads((self.root / name / SAVED).read_text(encoding="utf-8"))["iteration"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        found = checkpoint.complete(self.checkpoints)
        return found[-1] if found else None

    def keep_until(self, iteration: int, first: int = 1) -> list[int]:
        """Drops the rows of iterations that the resumed run will do again.

        Returns:
            The iterations from `first` to `iteration` that have no row in `metrics.jsonl`, as where it was cut.

        Raises:
            ValueError: a row is damaged, and not by the crash that ended the file.
        """
        done: set[float] = set()
        for path in (self.metrics, self.evaluations):
            if path.is_file():
                try:
                    lines = path.read_text(encoding="utf-8").splitlines()
                except UnicodeDecodeError as error:
                    raise ValueError(f"output_dir: {path} is damaged ({error}), want rows of metrics") from error
                numbers = [self._iteration(path, n, line, n == len(lines)) for n, line in enumerate(lines, start=1)]
                kept = [line for number, line in zip(numbers, lines, strict=True) if number <= iteration]
                files.write_text(path, "".join(line + "\n" for line in kept))
                if path == self.metrics:
                    done.update(numbers)
        return [number for number in range(first, iteration + 1) if number not in done]

    def find_checkpoint(self, resume: str | None) -> Path | None:
        """The checkpoint to continue from.

        Args:
            resume: "auto" for the newest one there is, a checkpoint folder, or None to start anew.

        Raises:
            ValueError: the directory holds a run, or results that the continued one would overwrite; or `resume` is
                neither "auto" nor a checkpoint.
        """
        if resume is None:
            if self.metrics.exists() or checkpoint.complete(self.checkpoints):
                raise ValueError(
                    f"output_dir: {self.root} already holds a run; continue it with --resume auto, or give another one"
                )
            return None
        if resume == "auto":
            return self.newest()
        chosen = Path(resume)
        if not (chosen / "state.json").is_file():
            inside = [str(path) for path in checkpoint.complete(chosen / "checkpoints")]
            hint = f"; checkpoints of that run: {', '.join(inside)}" if inside else ""
            raise ValueError(f'resume: got {resume}, want "auto" or the folder of a checkpoint{hint}')
        found = checkpoint.complete(self.checkpoints)
        own = chosen.resolve().parent == self.checkpoints.resolve()
        later = [path.name for path in found if not own or path.name > chosen.name]
        if later or (not own and self.metrics.exists()):
            raise ValueError(
                f"resume: {self.root} holds results that a run from {chosen} would overwrite "
                f"(checkpoints {', '.join(later) or 'none'}); move them away or give another output_dir"
            )
        return chosen

    @staticmethod
    def _iteration(path: Path, number: int, line: str, last: bool) -> float:
        try:
            return int(json.loads(line)["iteration"])
        except (ValueError, KeyError, TypeError) as error:
            # A crash can leave half a last line, which belongs to an iteration that is done again.
            if last and isinstance(error, json.JSONDecodeError):
                return math.inf
            raise ValueError(f"output_dir: {path} line {number} is damaged ({error}), want a row of metrics") from error
