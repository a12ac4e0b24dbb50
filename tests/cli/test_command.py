"""The command: its help, its version, its refusals, and what it does not import for them."""

import json
import subprocess
import sys
import warnings

import pytest

from dancegrpo_fast import __version__, cli
from dancegrpo_fast.cli import COMMANDS, info, main
from dancegrpo_fast.install import install_line
from dancegrpo_fast.memory.planning.specs import names

from ..processes import LIMIT

pytest.importorskip("jsonargparse")

LIGHT = """
import json, sys
from dancegrpo_fast.cli import main
found = {}
for words in (["--help"], ["--version"], ["recipes"], ["recipes", "--help"], ["info", "--help"], ["run", "--help"],
              ["memory", "--help"]):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, words
    found[" ".join(words)] = [name for name in ("torch", "numpy", "diffusers") if name in sys.modules]
print(json.dumps(found), file=sys.stderr)
"""


def test_help_and_lists_import_nothing_large() -> None:
    ran = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, timeout=LIMIT)
    found = json.loads(ran.stderr)
    assert len(found) == 7 and not any(found.values()), found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    shown = capsys.readouterr().out
    assert f"usage: dancegrpo-fast {command}" in shown
    if command == "memory":
        assert all(name in shown for name in names())


def test_warnings_of_ours_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def write(_: list[str]) -> None:
        found.extend(warnings.formatwarning("w", UserWarning, file, 1) for file in (cli.__file__, "theirs.py"))

    monkeypatch.setattr(info, "main", write)
    assert main(["info"]) == 0
    assert found == ["warning: w\n", "theirs.py:1: UserWarning: w\n"]


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"dancegrpo_fast {__version__}\n"
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"dancegrpo-fast {command}" in usage and f"`{command}`" in usage for command in COMMANDS)
    for words in ([], ["fly"], ["--version", "now"]):
        assert main(words) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(usage) and not shown.out
        assert not words or f'command: got "{words[0]}", want one of train, ' in shown.err
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "dancegrpo-fast train: got nothing, want RECIPE.yaml; --help says more\n"


def test_what_is_missing_comes_with_the_line_that_adds_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["train", "recipe.yaml"]) == 1
    assert capsys.readouterr().err.endswith(f"; want {install_line('train')}\n")
