"""Replacements whose words are kept, and forks of a project's step."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dancegrpo_fast.dropin.known import Known
from dancegrpo_fast.dropin.replaced import Replacements
from dancegrpo_fast.dropin.settings import Settings

from ..compat.cases import F32, PEERS, draw

STEP = PEERS["mixgrpo"].flow_grpo_step
HEAD = "    device = model_output.device\n"
V, X, AFTER = draw(F32, 1), draw(F32, 2), draw(F32, 3)


class Told:
    """Replacements that say what they say to a list."""

    def __init__(self, **settings: Any) -> None:
        self.said: list[str] = []
        self.all = Replacements(Settings(**settings), self.said.append)

    def stand_in(self, function: Any, owner: str | None = None, where: str = "x.py:1") -> Any:
        return self.all.stand_in(function, owner, where)

    def taken(self) -> list[Known]:
        """Which of ours stand in."""
        return [known for d in self.all.definitions if d.dispatch is not None for known in d.dispatch.taken]

    def calls(self) -> list[int]:
        """Rollouts, replays, and calls of the original."""
        (dispatch,) = [d.dispatch for d in self.all.definitions if d.dispatch is not None]
        return [*dispatch.meter.calls, sum(dispatch.kept.values())]


def replaced(function: Any = STEP, **settings: Any) -> tuple[Told, Any]:
    """Replacements, and what stands in for a function."""
    told = Told(**settings)
    return told, told.stand_in(function)


def fork(*edits: tuple[str, str], name: str = "flow_grpo_step", of: str = "mixgrpo") -> Callable[..., Any]:
    """A project's step, MixGRPO's where none is named, with its source changed."""
    text = Path(PEERS[of].__file__).read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    module = ModuleType("fork")
    exec(compile(text, "fork.py", "exec"), vars(module))
    return getattr(module, name)


def doing(text: str) -> Callable[..., Any]:
    """MixGRPO's step, which does `text` first."""
    return fork((HEAD, f"    {text}\n{HEAD}"))
