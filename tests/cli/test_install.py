"""The line that adds an extra, by how the package was installed."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from dancegrpo_fast.install import EXTRAS, install_line, missing

ROOT = Path(__file__).parents[2]


class Installed:
    """A distribution that says how it came."""

    def __init__(self, origin: dict | None, tool: str = "pip\n") -> None:
        self._files = {"INSTALLER": tool, "direct_url.json": None if origin is None else json.dumps(origin)}

    def read_text(self, name: str) -> str | None:
        return self._files[name]


HERE = ROOT.as_uri()
GIT = {"url": "https://host/a/b.git", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}
TAG = GIT | {"vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "0123abc"}, "subdirectory": "sub"}
CASES = [
    (Installed(None), 'pip install "dancegrpo_fast[demo]"'),
    (Installed(None, "uv"), 'uv pip install "dancegrpo_fast[demo]"'),
    (Installed({"url": HERE, "dir_info": {}}), f'pip install "{ROOT}[demo]"'),
    (Installed({"url": HERE, "dir_info": {"editable": True}}), f'pip install --editable "{ROOT}[demo]"'),
    (
        Installed({"url": "file:///none/a%20b", "dir_info": {}}),
        'pip install "/none/a b[demo]" (once /none/a b is there again)',
    ),
    (
        Installed({"url": f"{HERE}/README.md", "archive_info": {}}),
        f'pip install "dancegrpo_fast[demo] @ {HERE}/README.md"',
    ),
    (Installed(GIT), 'pip install "dancegrpo_fast[demo] @ git+https://host/a/b.git@0123abc"'),
    (Installed(TAG), 'pip install "dancegrpo_fast[demo] @ git+https://host/a/b.git@v1#subdirectory=sub"'),
]


@pytest.mark.parametrize(("installed", "line"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_the_line_names_where_it_came_from(installed: Installed, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    assert install_line("demo") == line


def test_only_what_an_extra_brings_gets_a_line() -> None:
    assert missing(ImportError("no sklearn", name="sklearn.svm")) == f"no sklearn; want {install_line('demo')}"
    assert missing(ImportError("no other", name="other")) == "no other"
    assert missing(ImportError("nameless")) == "nameless"


def test_the_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    of = metadata.packages_distributions()
    for extra, modules in EXTRAS.items():
        wanted = {re.split(r"[>\[]", line)[0] for line in extras[extra]} - {"dancegrpo_fast"}
        brought = {name.lower() for module in modules for name in of[module]}
        assert wanted - {"pillow"} <= brought and brought & wanted, extra
