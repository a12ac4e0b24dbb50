"""`dancegrpo-fast run --dry-run`: what it finds in files that it does not run, and what it says of it."""

import ast
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.cli import main
from dancegrpo_fast.dropin import scan
from dancegrpo_fast.dropin.known import KNOWN, misfit
from dancegrpo_fast.dropin.source import parameters

from .test_run import RUN, python, write
from .test_run_imports import FILES, STEP

BROKEN = "raise SystemExit('this must not run')\n"
FIT = "tried at its first call as dancegrpo_fast.compat.dancegrpo.flux_step (DanceGRPO; "


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    files = {
        **{name: text for name, text in FILES.items() if name.startswith(("strings/", "relative/", "namespace/"))},
        "train.py": f"{BROKEN}import torch, os.path, strings.registry, unreadable\nfrom installed import steps\n"
        f"from namespace.deep import steps, absent\n\n\ndef f():\n    from relative import exported\n\n\n{STEP}",
        "namespace/deep/steps.py": BROKEN + STEP.replace("grpo, sde_solver", "grpo, sde_solver, tree"),
        "namespace/deep/program.py": f"{BROKEN}from .steps import flux_step\nfrom ..other import x",
        "namespace/other.py": BROKEN + STEP,
        "unreadable.py": "def f(:",
        "site-packages/installed/steps.py": STEP,
        "program/__main__.py": f"{BROKEN}import beside",
        "program/beside.py": STEP,
        "package/__main__.py": f"{BROKEN}from . import beside",
        "package/beside.py": STEP,
        "nothing.py": f"{BROKEN}def f(): ...",
        "wrong.py": "x = (",
    }
    write(root, files)
    return root


Listing = Callable[..., list[str]]


@pytest.fixture
def listed(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Listing:
    monkeypatch.chdir(repository)
    monkeypatch.setattr(sys, "path", [*sys.path, str(repository / "site-packages")])

    def run(*arguments: str) -> list[str]:
        before = sys.modules.copy()
        assert main(["run", "--dry-run", *arguments]) == 0
        assert sys.modules.keys() - before.keys() <= {"dancegrpo_fast.dropin.scan"}
        return capsys.readouterr().out.splitlines()

    return run


def test_a_script_and_what_it_imports_are_listed(repository: Path, listed: Listing) -> None:
    script = repository / "train.py"
    line = script.read_text().partition("def flux_step")[0].count("\n") + 1
    found = listed("train.py", "--own", "x")
    wanted = [
        f"{repository}/namespace/deep/steps.py:2 flux_step: left alone: as dancegrpo_fast.compat.dancegrpo.flux_step "
        "it has a parameter tree without a default",
        f"{repository}/relative/inner/steps.py:3 flux_step: {FIT}",
        f"{repository}/strings/schedulers.py:2 FlowMatchSDEDiscreteScheduler.sample_previous_step: left alone: as "
        "dancegrpo_fast.compat.verl_omni.FlowMatchSDEDiscreteScheduler.sample_previous_step it has no parameter "
        "model_output",
        f"{repository}/strings/steps.py:1 flux_step: {FIT}",
        f"{repository}/unreadable.py: not looked at: invalid syntax (unreadable.py, line 1)",
    ]
    assert found[0].startswith(f"{script}:{line} flux_step: {FIT}") and len(found) == 1 + len(wanted)
    assert all(map(str.startswith, sorted(found[1:]), wanted))


def test_only_and_skip_are_said(repository: Path, listed: Listing) -> None:
    found = listed("--only", "relative.inner.steps:flux_step", "--skip=__main__:flux_step", "train.py")
    (kept,) = (line.partition(": ")[2] for line in found if "relative" in line)
    assert kept.startswith(FIT)
    assert sum("left alone: not named by --only" in line for line in found) == len(found) - 2
    assert "left alone: named by --skip" in listed("--skip=__main__:flux_step", "train.py")[0]


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (["-m", "namespace.deep.program"], ["namespace/other.py:2", "namespace/deep/steps.py:2"]),
        (["-m", "package"], ["package/beside.py:1"]),
        (["program"], ["program/beside.py:1"]),
    ],
)
def test_programs(words: list[str], places: list[str], repository: Path, listed: Listing) -> None:
    assert {line.partition(" ")[0] for line in listed(*words)} == {f"{repository}/{place}" for place in places}


def test_nothing_and_errors(listed: Listing, capsys: pytest.CaptureFixture[str]) -> None:
    text = "neither it nor what it imports outside of site-packages defines a known function"
    assert listed("nothing.py") == [f"nothing.py: {text}"]
    for words, message in {
        "wrong.py": "wrong.py: '(' was never closed (wrong.py, line 1)",
        "-m installed.steps": "-m: got installed.steps, want a module of the user's own files",
        "-m no.such": "-m: got no.such, want a module",
    }.items():
        assert main(["run", "--dry-run", *words.split()]) == 1
        assert message in capsys.readouterr().err


def test_an_editable_finder_and_a_zip_file_are_looked_through(tmp_path: Path) -> None:
    hooks = {name: text.replace("%s", str(tmp_path / "elsewhere")) for name, text in FILES.items() if "hooks/" in name}
    write(tmp_path, hooks | {"elsewhere/__init__.py": "", "elsewhere/steps.py": STEP})
    (tmp_path / "train.py").write_text(f"from editable import steps\n{BROKEN}")
    done = python(tmp_path, *RUN, "--dry-run", "train.py", path=[tmp_path / "hooks"])
    assert done.stdout.startswith(f"{tmp_path}/elsewhere/steps.py:1 flux_step: tried"), done.stderr


@pytest.mark.parametrize("known", {known.ours: known for known in KNOWN}.values(), ids=lambda known: known.ours)
def test_our_own_signatures_are_read_as_python_has_them(known: Any) -> None:
    read, real = scan._ours(known.ours), tuple(inspect.signature(known.load()).parameters.values())
    assert [(p.name, p.kind, p.default is p.empty) for p in read] == [
        (p.name, p.kind, p.default is p.empty) for p in real
    ]
    assert misfit(known, real, read) == misfit(known, real)


def test_written_signatures() -> None:
    text = "def f(a, /, b, c=1, *d, e, g=(1, 'x'), h=A.b, **i): ..."
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert str(inspect.Signature(parameters(node))) == "(a, /, b, c=1, *d, e, g=(1, 'x'), h='A.b', **i)"
