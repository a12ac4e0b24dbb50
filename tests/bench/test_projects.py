"""What `run` does with the scripts of a checked-out project: found, replaced, refused, and nothing left behind."""

from pathlib import Path

import pytest

from bench.projects import look, table
from tests.compat.cases import PEERS

STEP = Path(PEERS["dancegrpo"].__file__).read_text()
MAIN = '\nif __name__ == "__main__":\n    from pathlib import Path\n\n    Path("written").write_text("")\n'


@pytest.mark.release
def test_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, here = tmp_path / "project", tmp_path / "here"
    for folder in (project / "steps", here):
        folder.mkdir(parents=True)
    (project / "steps" / "flux.py").write_text(STEP)
    (project / "steps" / "fork.py").write_text(STEP.replace("log(2 * math.pi)", "log(2.2 * math.pi)"))
    (project / "train.py").write_text(f"import absent_package.part\nfrom steps import flux, fork\n{MAIN}")
    (project / "nothing.py").write_text(MAIN)
    monkeypatch.chdir(here)
    nothing, train = look(project)
    assert (nothing["script"], train["script"]) == ("nothing.py", "train.py") and "functions" not in nothing
    assert train["ended"] == "ran to its end" and train["absent"] == ["absent_package"]
    taken = {row["place"].partition(":")[0]: row["taken"] for row in train["functions"]}
    assert taken == {"steps/flux.py": ["dancegrpo_fast.compat.dancegrpo.flux_step"], "steps/fork.py": []}
    assert len(train["refused"]) == 1 and train["refused"][0].startswith("steps/fork.py:")
    text = table({"project": {"state": "now", "rows": [nothing, train]}})
    assert "| project (now) | 2 | 1 | 0 | 1 | 0 |" in text
    # What a script does is done somewhere else.
    assert not list(here.iterdir()) and not (project / "written").exists()
