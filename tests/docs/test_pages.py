"""README and docs: their blocks run, and what they name is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

import dancegrpo_fast
from dancegrpo_fast.recipe import RewardSettings, load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = "<!-- slow -->"
# A file in inline code: in a folder of the repository, and with an ending.
FILE = re.compile(r"`((?:dancegrpo_fast|kernels|csrc|bench|docs|examples|recipes|tests)/[\w./-]+\.\w+)`")


def run_bash(example: Example) -> None:
    """Runs a block as a user who stands in the repository, with what is installed here."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-euo", "pipefail", "-c", str(example.parsed)], check=True, env=os.environ | {"PATH": path})


def load_yaml(example: Example) -> None:
    """Reads a whole recipe, or the rewards of one."""
    text = str(example.parsed)
    if not text.startswith("name:"):
        text = f"{BARE}\n{text}"
    Path("block.yaml").write_text(text, encoding="utf-8")
    recipe, _ = load_recipe(["block.yaml"])
    assert all(isinstance(reward, RewardSettings) for reward in recipe.rewards)


BARE = """name: bare
model: {family: flux, path: nowhere}
sampler: {kind: dance_sde, num_steps: 4, eta: 0.3, height: 16, width: 16}
prompts: prompts.txt
train: {iterations: 1, prompts_per_iteration: 1, group_size: 2, micro_batch: 1}"""
BLOCKS = Sybil([PythonCodeBlockParser(), CodeBlockParser("bash", run_bash), CodeBlockParser("yaml", load_yaml)])


def blocks_of(page: Path) -> list[tuple[bool, Example]]:
    """What runs of a page, and whether it is slow."""
    document: Document = BLOCKS.parse(page)
    return [(document.text[: one.start].rstrip().endswith(SLOW), one) for one in document.examples()]


def cases() -> list[object]:
    """Every page with blocks, and with its slow ones where it has some."""
    found: list[object] = []
    for page in PAGES:
        slow = {slow for slow, _ in blocks_of(page)}
        name = str(page.relative_to(ROOT))
        if False in slow:
            found.append(pytest.param(page, False, id=name))
        if True in slow:
            found.append(pytest.param(page, True, id=f"{name}, all of it", marks=pytest.mark.release))
    return found


@pytest.mark.parametrize("page, slow", cases())
def test_blocks_run(page: Path, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("examples", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    for later, example in blocks_of(page):
        if slow or not later:
            example.evaluate()


def test_the_site_builds(site: Path) -> None:
    for page in ("index.html", "atlas.html", "api/ops.html", "repository/CONTRIBUTING.html"):
        assert (site / page).is_file()


def test_every_public_module_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    found = set(re.findall(r"^::: dancegrpo_fast\.(\w+)", pages, flags=re.MULTILINE))
    assert set(dancegrpo_fast.__all__) - found == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_are_there(page: Path) -> None:
    named = FILE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_front_page_is_one_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for door in ("## I have a script", "## I want to run a recipe", "## Will it fit?"):
        start = text.index(door)
        assert re.search("^```(python|bash)$", text[start : text.index("\n## ", start + 1)], flags=re.MULTILINE), door


def test_claims_name_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named and {name for name in named if f"def {name}(" not in sources} == set()
