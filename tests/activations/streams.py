"""CUDA's streams without a GPU: what is copied on the side, and when the main one waits for it."""

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass
class Stream:
    """A stream that writes ("copied", place in the log) for an event, and ("awaited", that place) for a wait."""

    name: str
    log: list[Any]

    def wait_stream(self, other: Any) -> None:
        assert (self.name, other.name) == ("side", "main")

    def record_event(self) -> int:
        event = len(self.log)
        self.log.append(("copied", event))
        return event

    def wait_event(self, event: int) -> None:
        assert self.name == "main" and self.log[event] == ("copied", event)
        self.log.append(("awaited", event))


def side_stream(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> Stream:
    """A stream for copies, beside a main one that torch says is current."""
    main = Stream("main", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return Stream("side", log)
