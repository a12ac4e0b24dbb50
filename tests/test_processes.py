"""The helper of tests that start processes."""

import sys
import time
from pathlib import Path

import pytest

from . import processes
from .processes import together


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_each_process_printed(tmp_path: Path) -> None:
    environments = [{"WHO": "one"}, {"WHO": "two"}]
    said = together([python("import os; print(os.environ['WHO'])")] * 2, tmp_path, environments)
    assert said == ["one\n", "two\n"]


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="no such thing"):
        together([python("import time; time.sleep(300)"), python("raise KeyError('no such thing')")], tmp_path)
    assert time.monotonic() - began < processes.LIMIT / 10


def test_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LIMIT", 0.1)
    with pytest.raises(AssertionError, match=r"\[None\]"):
        together([python("import time; time.sleep(300)")], tmp_path)


def test_forked_scripts_have_imported_what_a_run_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1], 'accelerate' in sys.modules, __name__)\n")
    commands = [[str(script), name] for name in "ab"]
    assert together(commands, tmp_path, scripts=True) == ["a True __main__\n", "b True __main__\n"]
    script.write_text("raise KeyError('no such thing')\n")
    with pytest.raises(AssertionError, match="no such thing"):
        together(commands[:1], tmp_path, scripts=True)
