"""The order of the rooms, no circles, a map that names every room, and files that are not long."""

import re
from pathlib import Path

import pytest

from .rooms import ORDER, PACKAGE, House, circles, read, room, upward

ROOT = Path(__file__).parents[1]
FOLDERS = (PACKAGE, "kernels", "csrc", "bench", "tests", "examples")
MOST_LINES = 400
# Modules that a string names although they are above, and why that stays.
MENTIONS = {
    ("dropin.known", "compat"): "what it puts in place of a script's functions, loaded when one is called",
    ("dropin.launchers", "cli"): "a child process is started as `python -m dancegrpo_fast.cli run`",
    ("memory", "profile"): "public names from when profiles were a part of it",
    ("rewards", "demo"): "the demo's rewards, which a recipe names like all others",
}


@pytest.fixture(scope="module")
def house() -> House:
    return read(ROOT)


def test_rooms_keep_their_order(house: House) -> None:
    assert upward(house.imports) == []
    # What the order says of a room that is gone would say nothing.
    assert sorted(" ".join(ORDER).split()) == house.rooms


def test_no_circles(house: House) -> None:
    assert circles(house.arrows) == []
    assert circles(house.imports) == []


def test_upward_mentions_have_a_reason(house: House) -> None:
    found = {(start.removeprefix(f"{PACKAGE}."), room(end)) for start, end in upward(house.mentions)}
    assert found == MENTIONS.keys()


def test_the_reader_finds_what_is_wrong(tmp_path: Path) -> None:
    files = {
        "__init__.py": 'HOMES = {"name": "low"}',
        "low/__init__.py": "",
        "low/a.py": "def f():\n    from ..high import x\n    from . import b",
        "low/b.py": "import p.low.a as a\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import lost",
        "high.py": "from .low.a import f\nfrom . import low\nNAMES = ['p.lost:Thing', 'p.nothing', 'low']",
        "lost.py": "from importlib import metadata\nfrom p.high import x",
    }
    for name, text in files.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text(text)
    found = read(tmp_path, "p")
    within = {("p.low.a", "p.low.b"), ("p.low.b", "p.low.a")}
    across = {("p.low.a", "p.high"), ("p.high", "p.low.a"), ("p.high", "p.low"), ("p.lost", "p.high")}
    assert found.imports == within | across
    assert found.mentions == {("p", "p.low"), ("p.high", "p.lost")}
    assert upward(found.imports, ["low", "high"]) == [("p.lost", "p.high"), ("p.low.a", "p.high")]
    assert upward(found.imports, ["low high", "lost"]) == [
        ("p.high", "p.low"),
        ("p.high", "p.low.a"),
        ("p.low.a", "p.high"),
    ]
    assert circles(found.imports) == [["p.high", "p.low.a", "p.low.b"]]
    assert circles(found.arrows) == [["high", "low"]]


def test_the_map_names_every_room(house: House) -> None:
    """CONTRIBUTING.md's "Where things are": a line for each room, and none for what is not there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(r"^## Where things are\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    places = re.findall(r"^\| `(.*?)` \|", section[1], re.MULTILINE)
    inside = [place.removeprefix(f"{PACKAGE}/") for place in places if place.startswith(f"{PACKAGE}/")]
    assert sorted(re.sub(r"/$|\.py$", "", place) for place in inside) == sorted({*house.rooms} - {"kernels", PACKAGE})
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_no_source_file_is_long() -> None:
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh"}
    files = [p for name in FOLDERS for p in (ROOT / name).rglob("*.*") if p.suffix in suffixes]
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert [f"{p.relative_to(ROOT)}: {n} lines" for p, n in lengths.items() if n > MOST_LINES] == []
