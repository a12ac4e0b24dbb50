"""Runs one command of a stage: everything it prints goes to the log, and it ends within its limit."""

import ctypes
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

_PRCTL = ctypes.CDLL(None).prctl
_PDEATHSIG = 1


def _end_with_the_gate() -> None:
    """What was started ends even where the gate is killed and can end nothing."""
    _PRCTL(_PDEATHSIG, signal.SIGKILL)


@dataclass
class Runner:
    """Where commands run, and until when.

    Attributes:
        tree: their working directory, the private copy of the repository.
        log: what all commands print.
        deadline: of the whole gate, on the monotonic clock.
        stage_ends: of the stage, on the same clock.
        packages: a folder of packages that were brought along.
        extra: variables of the environment.
    """

    tree: Path
    log: Path
    deadline: float
    stage_ends: float = 0.0
    packages: Path | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds that the stage has."""
        return min(self.stage_ends, self.deadline) - time.monotonic()

    def say(self, text: str) -> None:
        """To the console and the log."""
        print(text, flush=True)
        with self.log.open("a") as file:
            file.write(text + "\n")

    def run(
        self,
        *command: str,
        environment: dict[str, str] | None = None,
        echo: bool = False,
        seconds: float | None = None,
    ) -> tuple[int | None, str]:
        """Exit status, None where a limit ended it, and what was printed; `echo` prints it as it comes.

        `seconds` is a limit beside the stage's.
        """
        with self.log.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n")
        begin = self.log.stat().st_size
        brought = str(self.packages) if self.packages else None
        path = os.pathsep.join(filter(None, (str(self.tree), brought, os.environ.get("PYTHONPATH"))))
        variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **self.extra}
        variables |= environment or {}
        status: int | None
        with self.log.open("ab") as file:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.tree,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_the_gate,
                )
            except OSError as error:
                return 127, str(error)
            try:
                status = self._wait(process, begin if echo else None, self.left() if seconds is None else seconds)
            except BaseException as error:
                # Compilers and test workers too, whatever ended the wait.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                status = None
        with self.log.open("rb") as log:
            log.seek(begin)
            return status, log.read().decode(errors="replace")

    def _wait(self, process: "subprocess.Popen[bytes]", printed: int | None, seconds: float) -> int:
        """Until it ends; prints the log from `printed` on."""
        ends = time.monotonic() + max(1.0, min(seconds, self.left()))
        with self.log.open("rb") as log:
            while True:
                try:
                    return process.wait(timeout=max(0.0, min(ends - time.monotonic(), 0.2 if printed else ends)))
                except subprocess.TimeoutExpired:
                    if time.monotonic() >= ends:
                        raise
                finally:
                    if printed:
                        log.seek(printed)
                        print(log.read().decode(errors="replace"), end="", flush=True)
                        printed = log.tell()


def last_lines(text: str, count: int) -> str:
    """The end of what a command printed."""
    return "\n".join(text.rstrip().splitlines()[-count:])
