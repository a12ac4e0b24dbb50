"""A disk that is full: what could not be written is named, what was written before is whole, and the run goes on."""

import errno
import resource
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from dancegrpo_fast import files
from dancegrpo_fast.cli import main
from dancegrpo_fast.evaluate.scores import save_sample
from dancegrpo_fast.models.base import DiffusersModel
from dancegrpo_fast.models.prompt_store import PromptStore, given_identity
from dancegrpo_fast.run import checkpoint
from dancegrpo_fast.train import loop as module

from ..train import tiny


@contextmanager
def small_files() -> Iterator[None]:
    """The system refuses to make files larger than a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def limited(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) != number:
            return function(*arguments, **options)
        with small_files():
            return function(*arguments, **options)

    return limited


@pytest.fixture
def recipe(flux: Path, tmp_path: Path) -> Path:
    judged = tiny.EvaluationSettings(every=1, samples_per_prompt=2, grid_samples=1, rewards=[tiny.reward("Brightness")])
    small = {"num_steps": 3, "prompts_per_iteration": 1, "group_size": 2, "micro_batch": 2, "evaluation": judged}
    return tiny.write_recipe(tiny.make_recipe(flux, tmp_path / "run", **small), tmp_path / "a recipe.yaml")


@pytest.mark.parametrize(
    ("place", "owner", "name", "call", "newest"),
    [
        pytest.param("checkpoints/000001", checkpoint, "save", 1, None, marks=pytest.mark.release),
        ("checkpoints/000002", checkpoint, "save", 2, "000001"),
        ("metrics.jsonl", module, "append_rows", 6, "000001"),
        pytest.param("samples/000002-ode.png", module, "save_samples", 5, "000002", marks=pytest.mark.release),
        pytest.param("evaluations.jsonl", module, "append_rows", 7, "000002", marks=pytest.mark.release),
        pytest.param("model", DiffusersModel, "save", 1, "000002", marks=pytest.mark.release),
    ],
)
def test_a_run_says_what_is_whole_and_goes_on(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    owner: Any,
    name: str,
    call: int,
    newest: str | None,
) -> None:
    run = recipe.parent / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(call, getattr(owner, name)))
        assert main(["train", str(recipe), "--seed", "1"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    failed = f"dancegrpo-fast train: [Errno 27] File too large: '{run / place}'; "
    checkpoints = [path.name for path in (run / "checkpoints").glob("[!.]*")]
    assert [path.name for path in run.rglob(".*")] == [".lock"]
    if newest is None:
        assert f"{failed}no checkpoint had been written, begin again with: dancegrpo-fast train " in said
        assert checkpoints == []
        return
    resumed = f"dancegrpo-fast train '{recipe}' --seed 1 --resume auto"
    assert said.endswith(f"{failed}{run / 'checkpoints' / newest} is whole, go on with: {resumed}\n")
    assert max(checkpoints) == newest and not (run / "model").exists()
    assert main(shlex.split(resumed)[1:]) == 0
    assert (run / "model" / "transformer" / "config.json").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_errors_name_the_file_and_the_room(tmp_path: Path) -> None:
    wanted = r"\[Errno 28\] No space left on device, 3\.0 MB to write, [0-9,.]+ MB free: '.*/gone/file'$"
    for error in (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device", "another"),
    ):
        with pytest.raises(OSError, match=wanted), files.writing(tmp_path / "gone" / "file", 3_000_000):
            raise error
    for error in (SafetensorError("invalid header"), FileNotFoundError(errno.ENOENT, "No such file", "another")):
        with pytest.raises(type(error)) as kept, files.writing(tmp_path / "file"):
            raise error
        assert kept.value is error
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device, [0-9,.]+ MB free: '.*/metrics\.jsonl'"):
        files.append_rows(tmp_path / "metrics.jsonl", [{"iteration": 1}])


def test_files_that_were_there_stay(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "whole")
    frames = torch.rand(1, 3, 16, 16)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("whole")
    with pytest.raises(OSError, match=r"File too large: '.*/text'"), small_files():
        files.write_text(tmp_path / "text", "a longer text")
    with (
        pytest.raises(OSError, match=r"File too large: '.*/model'"),
        small_files(),
        files.replacing(tmp_path / "model") as folder,
    ):
        (folder / "weights").write_text("a longer text")
    with pytest.raises(OSError, match=r"File too large: '.*/picture\.png'"), small_files():
        save_sample(frames, tmp_path / "picture.png", None)
    assert (tmp_path / "text").read_text() == (tmp_path / "model" / "weights").read_text() == "whole"
    assert not list(tmp_path.glob(".*"))


def test_a_store_of_prompts_holds_no_half_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PromptStore(tmp_path / "store", given_identity("flux"))
    # What is in the system's cache may be refused only when it goes to the disk.
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"free: '.*\.safetensors'"):
        patch.setattr("os.fsync", full)
        store.add(["red"], {"prompt_embeds": torch.zeros(1, 8)})
    with pytest.raises(OSError, match=r"File too large: '.*\.safetensors'"), small_files():
        store.add(["red"], {"prompt_embeds": torch.zeros(1, 8)})
    assert [path.name for path in store.folder.iterdir()] == ["identity.json"]
    store.add(["red"], {"prompt_embeds": torch.zeros(1, 8)})
    assert store.missing(["red"]) == []
    with pytest.raises(OSError, match=r"File too large: '.*identity\.json'"), small_files():
        PromptStore(tmp_path / "other", given_identity("flux"))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_who_can_read_a_folder_can_read_its_files(tmp_path: Path) -> None:
    (shared := tmp_path / "shared").mkdir(mode=0o755)
    made = checkpoint.save(shared, 1, {"model": {"weight": torch.zeros(2)}}, {})
    store = PromptStore(shared / "store", given_identity("flux"))
    store.add(["red"], {"prompt_embeds": torch.zeros(1, 8)})
    for folder in (made, store.folder):
        for path in folder.iterdir():
            assert path.stat().st_mode & 0o666 == folder.stat().st_mode & 0o666
