"""Prompt files and folders: what is read of each format, and the errors that name it."""

import json
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.prompts import load_prompts, prompts_of_iteration

pa = pytest.importorskip("pyarrow")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def texts(path: Path, split: str = "train") -> list[str]:
    return [prompt.text for prompt in load_prompts(path, split)]


def test_prompt_files(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    assert [p.text for p in load_prompts(write(tmp_path / "a.txt", "one\n\n two \n"))] == ["one", "two"]
    rows = [{"prompt": "one", "digit": 1}, {"caption": "two", "digit": 2}]
    jsonl = load_prompts(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [(p.text, p.meta["digit"]) for p in jsonl] == [("one", 1), ("two", 2)]
    parquet.write_table(Table.from_pylist([{"caption": "x", "tag": "t"}]), tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet")[0].text == "x"
    assert load_prompts(tmp_path / "a.parquet")[0].meta["tag"] == "t"


HALF, NULL = "half of a surrogate pair at character 2", "a null character at character 3"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a \\ud83d cat"}', rf"jsonl row 2: got 'a \\ud83d cat' with {HALF}"),
        ("b.jsonl", '{"caption": "a \\udc00"}', rf"jsonl row 1: got .* with {HALF}"),
        ("c.txt", "cat\0", rf"txt row 1: got 'cat\\x00' with {NULL}"),
        ("d.jsonl", '{"prompt": "cat\\u0000"}', rf"jsonl row 1: got .* with {NULL}"),
        ("e.txt", f"{'x' * 999}\0", r"txt row 1: got 'x{40}\\x00' with a null character at character 999"),
        ("f.jsonl", f'{{"prompt": "a", "n": {"9" * 5000}}}', "jsonl line 1 is not JSON"),
        ("g.jsonl", "[" * 100_000, "jsonl line 1 is not JSON"),
    ],
)
def test_text_that_no_tokenizer_takes_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^prompts: .*{message}"):
        load_prompts(write(tmp_path / name, text))


def test_whole_pairs_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "\\ud83d\\ude00"}')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcat")
    assert [load_prompts(tmp_path / name)[0].text for name in ("a.jsonl", "a.txt")] == ["\U0001f600", "cat"]


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "one\u2028two"}\r\n{"prompt": "three"}'.encode())
    assert [p.text for p in load_prompts(path)] == ["one\u2028two", "three"]


def test_prompt_folders(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "one\n")
    write(tmp_path / "test.txt", "two\n")
    assert load_prompts(tmp_path, "test")[0].text == "two"
    write(tmp_path / "train.jsonl", '{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"prompts: got 2 files train.* \(train.jsonl, train.txt\)"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", "\n\n", "holds no prompts"),
        ("a.xlsx", "x", "xlsx"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("b.jsonl", "[1]", "line 1 is list"),
        ("c.jsonl", '{"words": "x"}', r"row 1 has \['words'\], want a text as `prompt` or `caption` or `text`"),
        ("e.jsonl", '{"caption": ["x", "y"]}', "row 1 has a list of 2 as `caption`"),
        ("f.jsonl", '{"prompt": [{"role": "user"}]}', "row 1 has dict .* as `prompt`"),
        ("d.jsonl", '{"prompt": ""}', "row 1 has"),
        ("latin.txt", "caf\udce9", "latin.txt, want UTF-8"),
        ("a.parquet", "PAR1", "a.parquet, want a table that can be read"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"prompts: .*{message}"):
        load_prompts(path)


def test_every_epoch_is_a_permutation(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path / "a.txt", "\n".join("abcdefg")))
    order = [p.text for iteration in range(7) for p in prompts_of_iteration(prompts, 3, iteration, seed=1)]
    epochs = [order[start : start + 7] for start in range(0, 21, 7)]
    assert all(sorted(epoch) == list("abcdefg") for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order != [p.text for iteration in range(7) for p in prompts_of_iteration(prompts, 3, iteration, seed=2)]


COLUMNS = [
    ({"text": "t", "Caption": "c", "PROMPT": "p"}, "p"),
    ({"text": "t", "caption": "c", "prompt": None}, "c"),
    ({"Text": "t", "captions": "c"}, "t"),
    ({"caption": ["only"]}, "only"),
]


@pytest.mark.parametrize(("row", "wanted"), COLUMNS)
def test_the_prompt_is_the_first_of_three_columns_whatever_their_case(
    tmp_path: Path, row: dict[str, Any], wanted: str
) -> None:
    (prompt,) = load_prompts(write(tmp_path / "a.jsonl", json.dumps(row)))
    assert prompt.text == wanted
    assert prompt.meta == {name: value for name, value in row.items() if name.lower() != "prompt"}


CELLS = '\ufeffprompt,digit,note,\r\n"a ""red"", cat\nasleep",007,,0\r\n\r\nb,2,"x,y",1\r\n'
TEXTS = ['a "red", cat\nasleep', "b"]
PANDAS = {"prompt": {"0": TEXTS[0], "1": "b"}, "digit": {"0": 1, "1": 2}}


@pytest.mark.parametrize(
    ("name", "content", "digits"),
    [
        ("a.csv", CELLS, ["007", "2"]),
        ("a.tsv", 'prompt\tdigit\n"a ""red"", cat\nasleep"\t1\nb\t2\n', ["1", "2"]),
        ("list.json", [{"prompt": text, "digit": place} for place, text in enumerate(TEXTS)], [0, 1]),
        ("texts.json", TEXTS, None),
        ("columns.json", {"prompt": TEXTS, "digit": [1, 2]}, [1, 2]),
        ("pandas.json", PANDAS, [1, 2]),
        ("names.json", {"one": TEXTS[0], "two": {"caption": "b"}}, None),
        ("lines.json", "".join(json.dumps({"text": text, "digit": 1}) + "\n" for text in TEXTS), [1, 1]),
    ],
)
def test_files_of_ordinary_tools(tmp_path: Path, name: str, content: Any, digits: list[Any] | None) -> None:
    prompts = load_prompts(write(tmp_path / name, content if isinstance(content, str) else json.dumps(content)))
    assert [prompt.text for prompt in prompts] == TEXTS
    assert digits is None or [prompt.meta["digit"] for prompt in prompts] == digits
    if name == "a.csv":
        assert prompts[0].meta == {"digit": "007", "note": None, "": "0"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,digit\na cat, asleep,1\n", "row 1 has 3 cells, want 2 as the first line has"),
        ("b.csv", "prompt,digit,digit\na,1,2\n", "the columns .*, want each one once"),
        ("c.csv", 'prompt\n"a', "want lines of cells that can be read"),
        ("d.csv", "", "want lines of cells that can be read"),
        ("e.csv", "prompt\n", "holds no prompts"),
        ("a.json", "{", "is not JSON"),
        ("b.json", "3", "is int, want a list or an object"),
        ("c.json", "[[1]]", "row 1 is list, want a text or an object"),
        ("d.json", '{"prompt": ["a", "b"], "digit": [1]}', "the columns .*, want lists of one length"),
        ("e.json", '{"prompt": ["a"], "digit": 1}', "the columns .*, want lists of one length"),
        ("f.json", '{"prompt": {"0": "a"}, "digit": {"1": 1}}', "the columns .*, want lists of one length"),
        ("a.arrow", "ARROW1", "want a table that can be read"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^prompts: .*{name}.*{message}"):
        load_prompts(write(tmp_path / name, text))


def test_columns_that_a_run_does_not_use_never_stop_it(tmp_path: Path) -> None:
    from pyarrow import parquet

    late = pa.array([1 << 60, None], pa.timestamp("us"))
    table = pa.table(
        {
            "Prompt": ["a", "b"],
            "image": pa.array([{"bytes": b"\x89PNG", "path": "x.png"}, None]),
            "day": [date(2024, 1, 2), None],
            "ns": pa.array([1_704_067_200_000_000_001, None], pa.timestamp("ns")),
            "whole": pa.array([1_704_067_200_000_000_000, None], pa.timestamp("ns")),
            "late": late,
            "took": pa.array([timedelta(seconds=2), None]),
            "price": [Decimal("1.50"), None],
            "score": [float("nan"), 1.0],
            "tags": [["x"], []],
            "raw": [b"\0", None],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = load_prompts(tmp_path / "a.parquet")
    assert first.meta["whole"] == datetime(2024, 1, 1) and first.meta["day"] == date(2024, 1, 2)
    assert first.meta["ns"] == "2024-01-01 00:00:00.000000001" and second.meta["late"] is None
    # As an evaluation and a checkpoint write them.
    plain = json.loads(json.dumps(first.columns(), allow_nan=False))
    assert plain["image"]["bytes"].startswith("4 bytes, sha256 ") and plain["score"] is None
    assert (plain["price"], plain["took"], plain["day"]) == ("1.50", 2.0, "2024-01-02")
    assert second.columns()["price"] is None


def saved(folder: Path, *parts: list[str]) -> Path:
    """A data set as `Dataset.save_to_disk` lays it out."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        table = pa.table({"text": part})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_folders_of_hugging_face(tmp_path: Path) -> None:
    from pyarrow import feather, parquet

    assert texts(saved(tmp_path / "disk", ["a", "b"], ["c"])) == ["a", "b", "c"]
    saved(tmp_path / "dict" / "train", ["a"])
    saved(tmp_path / "dict" / "test", ["b"])
    assert (texts(tmp_path / "dict"), texts(tmp_path / "dict", "test")) == (["a"], ["b"])
    feather.write_feather(pa.table({"caption": ["f"]}), tmp_path / "one.arrow")
    assert texts(tmp_path / "one.arrow") == ["f"]
    data = tmp_path / "repo" / "data"
    data.mkdir(parents=True)
    for number, text in enumerate("xyz"):
        parquet.write_table(pa.table({"text": [text]}), data / f"train-{number:05d}-of-00003.parquet")
    assert texts(tmp_path / "repo") == ["x", "y", "z"]
    (data / "train-00001-of-00003.parquet").rename(data / "train-00003-of-00003.parquet")
    with pytest.raises(ValueError, match=r"got shards of .*data without train-00001-of-00003.parquet, want all 3"):
        load_prompts(tmp_path / "repo")
    (data / "train-00003-of-00003.parquet").rename(data / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"got shards of .*, want all . of one set"):
        load_prompts(tmp_path / "repo")
    (tmp_path / "disk" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"got .*disk without data-00001-of-00002.arrow"):
        load_prompts(tmp_path / "disk")
    write(tmp_path / "disk" / "state.json", "{}")
    with pytest.raises(ValueError, match=r"state.json, want it as save_to_disk writes it"):
        load_prompts(tmp_path / "disk")


def test_image_folders(tmp_path: Path) -> None:
    rows = '{"file_name": "a/1.png", "text": "one"}\n'
    write(tmp_path / "flat" / "metadata.jsonl", rows)
    write(tmp_path / "split" / "test" / "metadata.csv", "file_name,text\n1.png,two\n")
    (flat,), (test,) = load_prompts(tmp_path / "flat"), load_prompts(tmp_path / "split", "test")
    assert flat.meta["image"] == str((tmp_path / "flat" / "a" / "1.png").resolve())
    assert test.meta["image"] == str((tmp_path / "split" / "test" / "1.png").resolve())
    # A split of its own is nearer.
    write(tmp_path / "flat" / "train_metadata.jsonl", '{"prompt": "mine", "file_name": "x"}')
    (mine,) = load_prompts(tmp_path / "flat")
    assert mine.text == "mine" and "image" not in mine.meta
    with pytest.raises(ValueError, match=r"prompts: got 0 files test\.\* in .*, want one that ends in \.txt, "):
        load_prompts(tmp_path / "flat", "test")
