"""Prompt embeddings on disk: what is encoded when, and what is refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import files
from dancegrpo_fast.models import prompt_store
from dancegrpo_fast.models.prompt_store import PromptStore, given_identity
from dancegrpo_fast.recipe import Recipe

from ..processes import together
from .cases import CASES, PROMPTS, load, shards
from .cases import make_recipe as plain_recipe

WORKER = Path(__file__).with_name("prompt_store_worker.py")
IDENTITY = given_identity("flux")
Base = Callable[[str], Path]


def make_recipe(family: str, base: Path, folder: Path, **changes: Any) -> Recipe:
    """With a cache of its own in `folder`."""
    return plain_recipe(CASES[family], base, folder / "run", **{"prompt_cache": str(folder / "cache")} | changes)


def row(text: str) -> dict[str, Tensor]:
    return {"embeds": torch.full((1, 2, 3), float(len(text))), "mask": torch.ones(1, 2, dtype=torch.int64)}


def recorded(calls: list[str]) -> Callable[[], Callable[[str], Mapping[str, Tensor]]]:
    """Encoders that write down what they are asked for; "load" where they are loaded."""

    def load_encoders() -> Callable[[str], Mapping[str, Tensor]]:
        calls.append("load")

        def encode(text: str) -> Mapping[str, Tensor]:
            calls.append(text)
            return row(text)

        return encode

    return load_encoders


def test_only_missing_prompts_are_encoded(tmp_path: Path) -> None:
    calls: list[str] = []
    PromptStore(tmp_path / "store", IDENTITY).encode(["a", "bb", "a"], recorded(calls))
    assert calls == ["load", "a", "bb"]
    store = PromptStore(tmp_path / "store", IDENTITY)
    store.encode(["bb", "ccc", ""], recorded(calls))
    assert calls[3:] == ["load", "ccc", ""]
    store.encode(["", "a"], recorded(calls))
    assert len(calls) == 6
    rows = store.rows(["ccc", "", "a", "ccc"], ["embeds", "mask"])
    assert rows["embeds"][:, 0, 0].tolist() == [3.0, 0.0, 1.0, 3.0]
    assert rows["mask"].dtype == torch.int64 and rows["mask"].shape == (4, 2)


def test_a_shard_holds_a_thousand_prompts(tmp_path: Path) -> None:
    texts = [str(number) for number in range(1500)]
    PromptStore(tmp_path / "store", IDENTITY).add(texts, {"embeds": torch.arange(1500.0)[:, None]})
    assert sorted(map(len, shards(tmp_path / "store"))) == [500, 1000]
    found = PromptStore(tmp_path / "store", IDENTITY).rows(["1499", "0", "1000"], ["embeds"])["embeds"]
    assert found.flatten().tolist() == [1499.0, 0.0, 1000.0]


def test_a_shard_of_large_rows_holds_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A row has 24 bytes of embeddings and 16 of the mask.
    monkeypatch.setattr(prompt_store, "SHARD_BYTES", 119)
    texts = [letter * n for n, letter in enumerate("abcde", start=1)]
    calls: list[str] = []
    PromptStore(tmp_path / "encoded", IDENTITY).encode(texts, recorded(calls))
    every = {name: torch.cat([row(text)[name] for text in texts]) for name in row("a")}
    PromptStore(tmp_path / "added", IDENTITY).add(texts, every)
    for folder in ("encoded", "added"):
        assert sorted(map(len, shards(tmp_path / folder))) == [1, 2, 2]
        found = PromptStore(tmp_path / folder, IDENTITY).rows(texts, ["embeds", "mask"])
        assert all(torch.equal(found[name], every[name]) for name in every)
    assert calls == ["load", *texts]


def test_a_crash_loses_the_shard_in_the_making_and_nothing_else(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "store", IDENTITY)
    store.add(["a"], row("a"))

    def encode(text: str) -> Mapping[str, Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.encode(["a", "bb"], lambda: encode)
    # What a crash between the two files of a shard leaves: tensors without their list of texts.
    (orphan,) = (tmp_path / "store").glob("*.safetensors")
    shutil.copy(orphan, tmp_path / "store" / "0123456789abcdef.safetensors")
    (tmp_path / "store" / ".0123456789abcdef.77").write_bytes(b"half")
    again = PromptStore(tmp_path / "store", IDENTITY)
    assert again.missing(["a", "bb"]) == ["bb"]
    assert torch.equal(again.rows(["a"], ["embeds"])["embeds"], row("a")["embeds"])


@pytest.mark.release
def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(tmp_path / "store"), str(tmp_path / "meeting")]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environments = [environment | world | {"RANK": name, "LOCAL_RANK": name} for name in "01"]
    printed = [text.splitlines() for text in together([[*command, name] for name in "01"], tmp_path, environments)]
    folder = tmp_path / "store"

    def said(texts: list[str], where: Path) -> list[str]:
        return ["load", *texts, f"encoded {len(texts)} of {len(texts)} prompts into {where}"]

    def refused(name: str) -> str:
        return f"model.prompt_cache: got {folder}-{name}, want a folder that all processes share"

    # Of three prompts, then of one, then of two in folders that they do not share.
    first = [*said(["x"], folder), *said(["x"], Path(f"{folder}-0")), refused("0")]
    second = [*said(["y", "z"], folder), *said(["w"], folder), *said(["y"], Path(f"{folder}-1")), refused("1")]
    assert printed == [first, second]
    store = PromptStore(tmp_path / "store", IDENTITY)
    for number in range(20):
        texts = [f"{number} {name}" for name in ("both", "too", "0", "1")]
        assert store.rows(texts, ["embeds"])["embeds"].flatten().tolist() == [float(number)] * 4
    assert not list(tmp_path.glob(".*"))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (
        lambda shard: shard.write_bytes(shard.read_bytes()[:-4]),
        r"damaged file .*safetensors .*want it whole",
    ),
    "gone": (Path.unlink, r"damaged file .*safetensors .* made again"),
    "garbled list": (lambda shard: shard.with_suffix(".json").write_text('["a"'), r"damaged file .*json"),
    "other length": (lambda shard: shard.with_suffix(".json").write_text('["a", "b"]'), "another number of texts"),
    # Tensors of other names are refused where they are added.
    "other tensors": (
        lambda shard: PromptStore(shard.parent, IDENTITY).add(["b"], {"other": torch.zeros(1, 1)}),
        r"damaged file .*tensors",
    ),
    "no identity": (
        lambda shard: shard.with_name("identity.json").unlink(),
        r"want a folder with identity\.json",
    ),
    "foreign": (
        lambda shard: shard.with_name("identity.json").write_text(json.dumps(dict(given_identity("sd3")))),
        r"made from another model or settings \(\['family'\]\)",
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_and_foreign_folders(tmp_path: Path, how: str) -> None:
    PromptStore(tmp_path / "store", IDENTITY).add(["a"], row("a"))
    (shard,) = (tmp_path / "store").glob("*.safetensors")
    damage, message = DAMAGES[how]
    with pytest.raises(ValueError, match=message):
        damage(shard)
        PromptStore(tmp_path / "store", IDENTITY)


def test_unknown_prompts_and_tensors(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "store", IDENTITY)
    store.add(["a"], row("a"))
    with pytest.raises(ValueError, match=r'prompts: got "b", want one with embeddings in'):
        store.rows(["b"], ["embeds"])
    with pytest.raises(ValueError, match=r"got \['embeds', 'mask'\] in .*, want \['pooled'\] among them"):
        store.rows(["a"], ["pooled"])


@pytest.mark.parametrize("family", ["flux", "hunyuan_video"])
def test_a_row_is_the_same_alone_and_among_others(base: Base, tmp_path: Path, family: str) -> None:
    together, _ = load(make_recipe(family, base(family), tmp_path / "together"))
    recipe = make_recipe(family, base(family), tmp_path / "alone")
    (tmp_path / "alone" / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPTS[1]}) + "\n")
    alone, (prompt,) = load(recipe)
    assert alone._store.folder != together._store.folder
    names = alone.text_tensors
    one, among = alone._store.rows([prompt.text], names), together._store.rows(list(PROMPTS), names)
    assert all(torch.equal(one[name][0], among[name][1]) for name in names)


def test_text_encoders_are_loaded_once(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe("flux", base("flux"), tmp_path)
    first, prompts = load(recipe)

    def refuse(self: Any) -> None:
        raise AssertionError("text encoders are not needed")

    monkeypatch.setattr(type(first), "_load_text_encoders", refuse)
    again, _ = load(recipe)
    for name, value in first.encode(prompts).items():
        assert torch.equal(again.encode(prompts)[name], value)


def test_the_cache_depends_on_what_the_text_encoders_are(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base("flux"), folder)
    made = {load(make_recipe("flux", folder, tmp_path))[0]._store.folder}
    made.add(load(make_recipe("flux", folder, tmp_path, max_text_tokens=10))[0]._store.folder)
    made.add(load(make_recipe("flux", folder, tmp_path, dtype="bfloat16"))[0]._store.folder)
    made.add(load(make_recipe("flux", folder, tmp_path, text_encoder_quantization="fp8"))[0]._store.folder)
    weights = folder / "text_encoder_2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    made.add(load(make_recipe("flux", folder, tmp_path))[0]._store.folder)
    # The denoiser does not matter.
    shutil.copytree(base("flux"), tmp_path / "other")
    (tmp_path / "other" / "transformer" / "note.txt").write_text("x")
    made.add(load(make_recipe("flux", tmp_path / "other", tmp_path))[0]._store.folder)
    assert len(made) == 5
    assert {path.parent for path in made} == {tmp_path / "cache"}


def test_large_files_are_told_apart_by_any_of_their_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 16)
    file = tmp_path / "weights"
    found = set()
    for changed in (None, 0, 4999, 5 * (5000 - 16) // 63):
        data = bytearray(5000)
        if changed is not None:
            data[changed] = 1
        file.write_bytes(data)
        found.add(files.fingerprint(file))
    file.write_bytes(bytes(5001))
    found.add(files.fingerprint(file))
    assert len(found) == 5


def test_a_folder_without_text_encoders_brings_its_embeddings(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    full, prompts = load(make_recipe("flux", base("flux"), tmp_path))
    names = full.text_tensors
    rows = full._store.rows(list(PROMPTS), names)
    shutil.copytree(base("flux"), folder)
    for part in full.text_parts:
        shutil.rmtree(folder / part)
    recipe = make_recipe("flux", folder, tmp_path, prompt_cache=str(tmp_path / "unused"))
    with pytest.raises(ValueError, match=r"model.path: got .*, want .*'text_encoder'.* in it, or prompt_embeds/"):
        load(recipe)
    PromptStore(folder / "prompt_embeds", given_identity("flux")).add(list(PROMPTS), rows)
    given, _ = load(recipe)
    with Path(recipe.prompts).open("a") as file:
        file.write('{"prompt": "another"}\n')
    with pytest.raises(ValueError, match=r'prompts: got "another", want one with embeddings in .*prompt_embeds'):
        load(recipe)
    for name, value in full.encode(prompts).items():
        assert torch.equal(given.encode(prompts)[name], value)
    assert not (tmp_path / "unused").exists()
