"""`dancegrpo-fast recipes`: what is listed, and that a copy runs where it was copied to."""

from pathlib import Path

import pytest

from dancegrpo_fast.cli import main
from dancegrpo_fast.recipe import load_recipe

pytest.importorskip("jsonargparse")

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_the_list_has_a_sentence_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == NAMES
    entries = "\n".join(lines).replace("\n ", " ").splitlines()
    assert all(len(entry.split()) > 5 and entry.endswith(".") for entry in entries)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_finds_its_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["recipes", "copy", name, str(tmp_path)]) == 0
    monkeypatch.chdir(tmp_path)
    recipe, _ = load_recipe([f"recipes/{name}.yaml"])
    files = [recipe.prompts, *([recipe.evaluation.prompts] if recipe.evaluation and recipe.evaluation.prompts else [])]
    # The others are the user's to bring, and the recipe says so.
    assert all(Path(file).is_file() or file.startswith("data/") for file in files)
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert ("README.md" in text) == Path("recipes/README.md").is_file()
    for path in Path("recipes").rglob("*.*"):
        assert path.read_bytes() == (FOLDER / path.relative_to("recipes")).read_bytes()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = ["recipes", "copy", "digits", str(tmp_path)]
    prompts = tmp_path / "recipes" / "prompts" / "digits.jsonl"
    prompts.parent.mkdir(parents=True)
    prompts.write_text("mine")
    assert main(copy) == 1
    assert f"where {prompts} is another file" in capsys.readouterr().err
    assert prompts.read_text() == "mine" and not (tmp_path / "recipes" / "digits.yaml").exists()
    prompts.unlink()
    assert main(copy) == 0 and "wrote" in capsys.readouterr().out
    said = capsys.readouterr().out if main(copy) == 0 else ""
    assert "wrote" not in said and "digits.yaml is there already" in said
    assert f"in {tmp_path}:" in said and "  python -m dancegrpo_fast.demo digits\n" in said
    copy[-1] = str(prompts)
    assert main(copy) == 1 and f"folder: got {prompts}, which is a file" in capsys.readouterr().err


def test_unknown_names_are_told_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", "../digits", str(tmp_path)]) == 1
    assert f'name: got "../digits", want one of {", ".join(NAMES)}' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
