"""The examples in the modules' docstrings run."""

import doctest
import importlib
import itertools
import sys
import textwrap

import pytest
import torch

from dancegrpo_fast import compat

from .cases import F32, PEERS, SIGMAS, draw


@pytest.mark.parametrize("name", sorted({*dir(compat)} - {"Replacement", "patched"}))
def test_example(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"dancegrpo_fast.compat.{name}"))
    assert found.attempted > 0 and found.failed == 0


def test_the_example_of_patched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (compat.patched.__doc__ or "").splitlines()
    start = next(at for at, line in enumerate(lines) if line.lstrip().startswith("from "))
    margin = lines[start].partition("from")[0]
    code = itertools.takewhile(lambda line: not line.strip() or line.startswith(margin), lines[start:])
    script, found = PEERS["dancegrpo"], list[torch.Tensor]()
    monkeypatch.setitem(sys.modules, "train_grpo_flux", script)
    arguments = (draw(F32, 1), draw(F32, 2), 0.3, SIGMAS, 1, None, True, True)
    monkeypatch.setattr(script, "main", lambda given: found.extend(script.flux_step(*given)), raising=False)
    exec(textwrap.dedent("\n".join(code)), {"arguments": arguments})
    assert len(found) == 3 and "by='dancegrpo_fast.compat.dancegrpo.flux_step'" in capsys.readouterr().out
