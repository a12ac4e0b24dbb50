"""What a person at a terminal sees while something takes long."""

import os
import pty
import sys

import pytest

from dancegrpo_fast.progress import working


def test_a_line_on_a_terminal_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with working("tracing a model with a long name"):
            shown = os.read(reader, 1000).decode()
        assert shown == "\r\x1b[Ktracing a model wit" and os.read(reader, 1000) == b"\r\x1b[K"
    os.close(reader)


def test_nothing_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with working("tracing"):
        pass
    assert capfd.readouterr() == ("", "")
