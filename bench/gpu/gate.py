"""What the stages share, and the summary that lies on disk whenever the gate is ended."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .expectations import MISSED, Verdict
from .process import Runner, last_lines

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
# Not all of its cases were reached; it is under way, or was when the gate was ended; it did not begin.
CUT, RUNNING, NOT_REACHED = "cut off", "running", "not reached"
SUMMARY, TESTS, LOG = "gpu-gate.json", "gpu-tests.jsonl", "gpu-gate.log"
Outcome = tuple[str, str]


@dataclass
class Gate:
    """Of one run.

    Attributes:
        repository: where the gate was started.
        out: where its files go.
        rows: results file.
        dry: nothing needs a GPU.
        jobs: processes at once.
        runner: runs commands in the private copy.
        prebuilt: a folder of compiled modules.
        refused: why they are not used.
        resume: what an earlier run measured or passed is not done again.
        found: what `look` printed.
    """

    repository: Path
    out: Path
    rows: Path
    dry: bool
    jobs: int
    runner: Runner
    prebuilt: Path | None = None
    refused: list[str] = field(default_factory=list)
    resume: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """As programs of `bench` name it."""
        return "dry" if self.dry else "cuda"

    @property
    def capability(self) -> str:
        """Of the GPU, as "90"."""
        return str(self.found["gpu"]["capability"]) if self.found.get("gpu") else ""

    def python(self, *arguments: str, echo: bool = False, seconds: float | None = None) -> tuple[int | None, str]:
        """Runs this interpreter in the private copy."""
        return self.runner.run(sys.executable, *arguments, echo=echo, seconds=seconds)

    def judged(self, status: int | None, text: str, good: str) -> Outcome:
        """Passed with `good`, or failed with the end of what was printed."""
        if status == 0:
            return PASSED, good
        self.runner.say(last_lines(text, 25))
        return FAILED, "out of time" if status is None else f"exit status {status}"

    def look(self, names: Iterable[str]) -> str:
        """Fills `found`; returns what was printed where that does not work."""
        status, text = self.python("-m", "bench.gpu.look", *names)
        try:
            self.found = json.loads(last_lines(text, 1)) if status == 0 else {}
        except json.JSONDecodeError:
            self.found = {}
        return "" if self.found else last_lines(text, 3) or f"exit status {status}"


def replace_file(path: Path, text: str) -> None:
    """All of it or nothing, whenever the writer is ended."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


class Summary:
    """What a run found so far, in `gpu-gate.json`; written anew before and after each stage.

    Args:
        folder: where.
        head: of the whole run: when, which commit, where and how.
        names: of its stages.
    """

    def __init__(self, folder: Path, head: dict[str, Any], names: Iterable[str]) -> None:
        self.path = folder / SUMMARY
        stages = {name: {"verdict": NOT_REACHED, "detail": "", "seconds": 0.0} for name in names}
        self.data: dict[str, Any] = {**head, "finished": False, "stages": stages, "verdicts": []}

    def write(self) -> None:
        """To disk."""
        replace_file(self.path, json.dumps(self.data, indent=1) + "\n")

    def begin(self, name: str) -> None:
        """A stage starts."""
        self.data["stages"][name]["verdict"] = RUNNING
        self.write()

    def end(self, name: str, outcome: Outcome, seconds: float, verdicts: list[Verdict]) -> None:
        """A stage ended, and what its rows and tests show."""
        self.data["stages"][name] = {"verdict": outcome[0], "detail": outcome[1], "seconds": round(seconds, 1)}
        kept = [each for each in self.data["verdicts"] if each["stage"] != name]
        new = [{"stage": name, "claim": v.claim, "met": v.met, "text": v.text} for v in verdicts]
        self.data["verdicts"] = kept + new
        self.write()

    def finish(self) -> None:
        """Every stage was there."""
        self.data["finished"] = True
        self.write()

    @property
    def failed(self) -> list[str]:
        """Stages that did not do what they should."""
        return [name for name in unfinished(self.data) if self.data["stages"][name]["verdict"] != CUT]

    @property
    def missed(self) -> list[str]:
        """What was expected and is not so."""
        return [each["text"] for each in self.data["verdicts"] if not each["met"]]

    def lines(self) -> list[str]:
        """A line a stage, after what was missed."""
        stages = self.data["stages"].items()
        return [
            *(f"{MISSED} {text}" for text in self.missed),
            *(f"{each['verdict']:12}{name:12}{each['seconds']:6.0f} s  {each['detail']}" for name, each in stages),
        ]


def unfinished(last: dict[str, Any]) -> list[str]:
    """Stages of an earlier run's summary that failed or were not reached."""
    return [name for name, stage in last["stages"].items() if stage["verdict"] not in (PASSED, SKIPPED)]
