"""The version matrix, `make matrix`: every cell is an installation of its own; docs/compatibility.md has the table."""

import datetime
import json
import re
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

import nox

ROOT = Path(__file__).parent
ROWS, PAGE = ROOT / "docs" / "compatibility.jsonl", ROOT / "docs" / "compatibility.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = (ROOT / "constraints.txt").read_text().split()
COMPILED = "tests/triton/test_compiled_models.py"
# Ops, patches, peers' functions, samplers, every kernel that models launch compiled offline, and short recipes.
TESTS = (
    *("tests/ops", "tests/patch", "tests/compat", "tests/dropin", COMPILED, "tests/train/test_trainer.py"),
    *("tests/transitions", "tests/test_advantages.py"),
)
TRITONS = ("3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")

nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"
nox.needs_version = ">=2024.10"


@dataclass(frozen=True)
class Cell:
    """One installation."""

    python: str
    torch: str
    triton: str
    diffusers: str = "0.42.1"
    others: str = "as pinned"

    def constraints(self) -> list[str]:
        """Versions of everything; "lowest" takes the floors that pyproject.toml names for the trainer."""
        named = {"torch": self.torch, "triton": self.triton, "diffusers": self.diffusers}
        if self.others == "lowest":
            required = PROJECT["dependencies"] + EXTRAS["train"]
            floors = dict(re.split(r"(?:\[.*\])?>=", line) for line in required)
        else:
            floors = dict(line.split("==") for line in PINNED)
        return [f"{name}=={version}" for name, version in (floors | named).items()]


# The first has a wheel of torch without CUDA on some machines; the others bring gigabytes.
CELLS = {
    Cell("3.11", "2.13.0", "3.7.1"): "light",
    Cell("3.11", "2.13.0", "3.7.1", diffusers="0.42.0"): "light",
    Cell("3.11", "2.8.0", "3.4.0", others="lowest"): "heavy",
    Cell("3.12", "2.11.0", "3.6.0"): "heavy",
    Cell("3.13", "2.15.0", "3.9.0"): "heavy",
}


def _commit() -> str:
    """Of the tree that is tested; the table itself may have changed since."""
    git = ["git", "-C", str(ROOT)]
    ask = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", ".", ":!docs"])
    commit, changed = (subprocess.run(git + each, capture_output=True, text=True).stdout.strip() for each in ask)
    return f"{commit}-dirty" if changed else commit


def _install(session: nox.Session, cell: Cell) -> None:
    """Exactly the cell's versions, then the package as a user installs it."""
    limits = Path(session.create_tmp()) / "constraints.txt"
    limits.write_text("\n".join(cell.constraints()))
    wanted = [r for name in ("train", "demo", "judge", "test") for r in EXTRAS[name] if "dancegrpo_fast" not in r]
    environment = {"PIP_CONSTRAINT": str(limits)}
    # By itself first: everything after it takes the torch that is there.
    session.install("torch", "triton", "--quiet", env=environment)
    session.install(*wanted, "--quiet", env=environment)
    session.install("--no-deps", "--force-reinstall", "--config-settings=cmake.define.DGF_CUDA=OFF", ".", "--quiet")


def _tested(session: nox.Session, *arguments: str, **environment: str) -> str:
    """Runs pytest and counts what came out; a failing test does not end the session, as it belongs into the table."""
    report = Path(session.create_tmp()) / "report.xml"
    report.unlink(missing_ok=True)
    # The installed package, not the source folder, in the processes that tests start too.
    environment |= {"PYTHONSAFEPATH": "1"}
    session.run("pytest", "-q", f"--junitxml={report}", *arguments, env=environment, success_codes=[0, 1])
    suite = ElementTree.parse(report).getroot()[0]
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return f"{count['tests'] - failed - count['skipped']} passed, {failed} failed, {count['skipped']} skipped"


def _record(cell: Cell, what: str, outcome: str, sources: str) -> None:
    """Writes a cell's outcome in the place of its last one, and the table anew."""
    row = {**asdict(cell), "what": what, "outcome": outcome, "sources": sources}
    row |= {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", "commit": _commit()}
    key = (*asdict(cell).values(), what)
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    kept = [r for r in rows if (*(r[name] for name in asdict(cell)), r["what"]) != key]
    columns = list(row)
    rows = sorted([*kept, row], key=lambda r: [r[name] for name in ("what", "python", "torch")] + [r["triton"]])
    ROWS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    table += ["| " + " | ".join(str(r[name]) for name in columns) + " |" for r in rows]
    before, mark, _ = PAGE.read_text().partition("<!-- written by make matrix -->\n")
    PAGE.write_text(before + mark + "\n" + "\n".join(table) + "\n")


@nox.session
@nox.parametrize(
    ("python", "cell"), [nox.param(c.python, c, id=f"torch{c.torch}-{c.diffusers}", tags=[t]) for c, t in CELLS.items()]
)
def tests(session: nox.Session, cell: Cell) -> None:
    """The tests of ops, patches, compat, samplers, kernels and short recipes in one cell."""
    _install(session, cell)
    listed = session.run("python", "-P", "-m", "dancegrpo_fast.patch", silent=True, success_codes=range(101))
    changed = str(listed).count(" differs from ") + str(listed).count(" missing ")
    outcome = _tested(session, *TESTS, "-n", "2")
    _record(cell, "tests", outcome, f"{changed} differ")
    if " 0 failed" not in outcome or changed:
        session.error(f"{outcome}; {changed} sources of diffusers differ")


@nox.session(python="3.11", tags=["light"])
def kernels(session: nox.Session) -> None:
    """Every kernel that the patched models of all families launch, compiled offline by each Triton."""
    pinned = next(iter(CELLS))
    _install(session, pinned)
    failed = []
    for triton in TRITONS:
        folder = Path(session.create_tmp()) / f"triton-{triton}"
        session.install("--quiet", "--no-deps", "--upgrade", "--target", str(folder), f"triton=={triton}")
        outcome = _tested(session, COMPILED, PYTHONPATH=str(folder.absolute()))
        _record(Cell(pinned.python, pinned.torch, triton, pinned.diffusers), "kernels compiled", outcome, "")
        failed += [triton] if " 0 failed" not in outcome else []
    if failed:
        session.error(f"not with Triton {', '.join(failed)}")
