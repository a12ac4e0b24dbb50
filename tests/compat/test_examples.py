"""The example in each public module's docstring, in `patched`'s and on the page about scripts, run."""

import itertools
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dancegrpo_fast import compat

from .cases import PEERS

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"
MODULES = [name for name in dir(compat) if name not in compat.__all__]


def example(text: str) -> str:
    """The lines from the first import on that are indented as it is."""
    lines = text.splitlines()
    start = next(at for at, line in enumerate(lines) if line.lstrip().startswith(("import ", "from ")))
    margin = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
    kept = itertools.takewhile(lambda line: not line.strip() or line.startswith(margin), lines[start:])
    return textwrap.dedent("\n".join(kept))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_s_example(name: str) -> None:
    code = example(getattr(compat, name).__doc__)
    assert f"from dancegrpo_fast.compat.{name} import " in code and "assert " in code
    exec(compile(code, name, "exec"), {})


def test_the_example_of_patched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = PEERS["dancegrpo"]
    x, sigmas = torch.randn(2, 3, 4), torch.linspace(1, 0, 5)
    main = lambda arguments: script.flux_step(x, x, 0.3, sigmas, 1, None, True, True)  # noqa: E731
    monkeypatch.setattr(script, "main", main, raising=False)
    monkeypatch.setitem(sys.modules, "train_grpo_flux", script)
    exec(compile(example(compat.patched.__doc__ or ""), "patched", "exec"), {"arguments": None})
    assert "by='dancegrpo_fast.compat.dancegrpo.flux_step'" in capsys.readouterr().out


@pytest.mark.skipif(not PAGE.is_file(), reason="the page lies beside the package's sources")
def test_the_page_s_example() -> None:
    exec(compile(PAGE.read_text().partition("```python\n")[2].partition("```")[0], PAGE.name, "exec"), {})
