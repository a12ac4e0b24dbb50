"""The repository's lists: a row a run in `LEDGER.md`, and when each claim last held in `gpu-jobs.json`."""

import json
import shutil
from pathlib import Path
from typing import Any

from .expectations import Verdict, held
from .gate import Gate, Summary, replace_file

LEDGER, JOBS, NEVER = "LEDGER.md", "gpu-jobs.json", "never"
# Of a row's list of failures.
NAMED = 12


def jobs_of(repository: Path) -> list[dict[str, Any]]:
    """Every claim about a GPU."""
    found: list[dict[str, Any]] = json.loads((repository / "bench" / "results" / JOBS).read_text())["claims"]
    return found


def row(summary: dict[str, Any]) -> str:
    """Of the ledger: date, commit, machine, command and what was found, failures included."""
    stages, verdicts = summary["stages"], summary["verdicts"]
    by: dict[str, list[str]] = {}
    for name, stage in stages.items():
        by.setdefault(stage["verdict"], []).append(f"{name} ({stage['detail']})" if stage["detail"] else name)
    met = [each for each in verdicts if each["met"]]
    missed = [each["text"] for each in verdicts if not each["met"]]
    found = [f"{len(met)} of {len(verdicts)} expectations met"]
    found += [f"{verdict}: {', '.join(names)}" for verdict, names in by.items()]
    if missed:
        more = f"; and {len(missed) - NAMED} more" if len(missed) > NAMED else ""
        found.append(f"missed: {'; '.join(missed[:NAMED])}{more}")
    if not summary["finished"]:
        found.insert(0, "ended before its end")
    cells = (summary["started"], summary["commit"], summary["machine"], f"`{summary['command']}`", ". ".join(found))
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |\n"


def commits(text: str) -> set[str]:
    """Those of the rows of the ledger's last table, which is the GPU's."""
    table = text[text.rindex("\n|---") :].splitlines()[2:]
    return {line.split("|")[2].strip() for line in table if line.startswith("|")}


class Publisher:
    """Brings what a run found so far into the repository's lists, and beside the run's own files.

    A commit that is not known, or one with changes that are in no commit, gets its row and holds no claim.
    """

    def __init__(self, gate: Gate, summary: Summary) -> None:
        self.gate, self.summary = gate, summary
        results = gate.repository / "bench" / "results"
        self.results, self.before = results, (results / LEDGER).read_text()
        self.jobs = json.loads((results / JOBS).read_text())

    def write(self) -> None:
        """Of everything up to now; each time all of this run's."""
        data = self.summary.data
        verdicts = [Verdict(each["claim"], each["met"], each["text"]) for each in data["verdicts"]]
        commit = data["commit"]
        if commit and " " not in commit and not commit.endswith("-dirty"):
            for claim, holds in held(verdicts).items():
                for job in self.jobs["claims"]:
                    if job["id"] == claim and holds:
                        job["held"] = commit
        for name, text in ((LEDGER, self.before + row(data)), (JOBS, json.dumps(self.jobs, indent=1) + "\n")):
            for folder in (self.results, self.gate.out):
                replace_file(folder / name, text)
        if self.gate.rows.exists():
            shutil.copy2(self.gate.rows, self.results / self.gate.rows.name)
