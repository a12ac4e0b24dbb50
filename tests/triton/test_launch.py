"""The launcher's arithmetic: programs, words of the seed, merged dimensions, room that is kept. No kernel runs."""

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dancegrpo_fast.ops import _triton
from dancegrpo_fast.ops._triton import BLOCK, MAX_DIMS, MAX_PROGRAMS, Operands, merged, programs_for


@pytest.mark.parametrize("batch", [1, 3, 70_000])
@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2**31 - 1, 2**31 + 5])
def test_programs_cover_every_element_once(batch: int, numel: int) -> None:
    if batch * -(-numel // BLOCK) > MAX_PROGRAMS:
        with pytest.raises(ValueError, match=r"latents: got 70000 samples .*, want at most"):
            programs_for(batch, numel)
        return
    programs, blocks = programs_for(batch, numel)
    assert programs == batch * blocks
    assert (blocks - 1) * BLOCK < numel <= blocks * BLOCK
    assert programs <= 2**31 - 1


def test_masked_lanes_of_narrow_indices_stay_in_32_bits() -> None:
    for numel in (1, 2**31 - BLOCK, 2**31 - BLOCK + 1, 2**31, 2**40):
        _, blocks = programs_for(1, numel)
        assert _triton.needs_wide(numel) or blocks * BLOCK - 1 < 2**31


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 0xDEADBEEFCAFE, -1, -(2**63)])
def test_words_of_the_seed(seed: int) -> None:
    """int32 whatever the value, and the seed again as unsigned words; negative keys are `gaussian_noise`'s."""
    words = _triton.signed_words(seed)
    assert all(-(2**31) <= word < 2**31 for word in words)
    assert (words[0] % 2**32) + (words[1] % 2**32 << 32) == seed % 2**64


def addresses(tensor: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return tensor.as_strided((tensor.shape[0], *sizes), (tensor.stride(0), *strides)).flatten(1)


VIEWS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "crop": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 0))[..., 1:, 1:-2],
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "entry": lambda t: torch.stack([t, t], 1)[:, 1],
}


@pytest.mark.parametrize("first", VIEWS)
@pytest.mark.parametrize("second", VIEWS)
def test_merged_dimensions_reach_the_same_elements(first: str, second: str) -> None:
    values = torch.arange(2 * 4 * 3 * 5.0).reshape(2, 4, 3, 5)
    tensors = [VIEWS[first](values), VIEWS[second](values)]
    sizes, strides = merged(tensors)
    assert len(sizes) <= 3
    for tensor, own in zip(tensors, strides, strict=True):
        assert torch.equal(addresses(tensor, sizes, own), tensor.flatten(1))


def test_runs_keep_no_strides_and_merge_nothing_apart() -> None:
    run, entry, strided = (VIEWS[n](torch.zeros(2, 4, 3, 5)) for n in ("crop", "entry", "channels last"))
    operands = Operands((entry, None, strided), (torch.empty(2, 4, 3, 5),))
    assert [None if given is None else given[2] for given in operands.given] == [(), None, (1, 4), ()]
    assert operands.sizes == (4, 15) and operands.given[0][1] == 2 * 60
    operands = Operands((run, torch.zeros(2, 4, 3, 5).expand(2, 4, 3, 5)))
    assert operands.sizes == (4, 3, 5) and operands.given[1][2] == ()


def test_more_dimensions_than_the_kernel_has_are_copied() -> None:
    def scattered() -> torch.Tensor:
        return torch.randn(2, *(3,) * (MAX_DIMS + 1))[(slice(None), *(slice(0, 2),) * (MAX_DIMS + 1))]

    source, out = scattered(), scattered()
    operands = Operands((source,), (out,))
    assert operands.sizes == () and all(given[2] == () for given in operands.given)
    assert torch.equal(operands.given[0][0], source)
    operands.given[1][0].copy_(source)
    assert not torch.equal(out, source)
    operands.finish()
    assert torch.equal(out, source)


class Room:
    """A tensor on a device that is not there."""

    def __init__(self, count: int, **options: Any):
        self.count, self.made_in, self.streams = count, threading.get_ident(), []

    def numel(self) -> int:
        return self.count

    def record_stream(self, stream: object) -> None:
        self.streams.append(stream)


class Stream:
    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


class TestWorkspace:
    """Memory pools belong to threads and streams; what is kept comes from neither."""

    @pytest.fixture
    def streams(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Stream, Stream]:
        current, default = Stream(), Stream()
        monkeypatch.setattr(_triton, "_workspaces", {})
        for name in ("zeros", "empty"):
            monkeypatch.setattr(torch, name, Room)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        return current, default

    def test_what_is_kept_lies_in_no_pool(self, streams: tuple[Stream, Stream]) -> None:
        current, default = streams
        first = _triton._workspace(torch.device("cuda", 0), 4, 100)
        assert all(part.made_in != threading.get_ident() and part.streams == [current] for part in first)
        assert current.waited == [default]
        assert _triton._workspace(torch.device("cuda", 0), 1024, 1 << 15) is first
        larger = _triton._workspace(torch.device("cuda", 0), 1025, 1)
        assert larger is not first and larger[0].numel() == 1025 and larger[1].numel() == 1 << 15

    def test_a_capture_has_its_own(self, streams: tuple[Stream, Stream], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        found = [_triton._workspace(torch.device("cuda", 0), 4, 100) for _ in range(2)]
        assert found[0][0] is not found[1][0] and _triton._workspaces == {}
        assert all(part.made_in == threading.get_ident() and not part.streams for each in found for part in each)

    def test_no_room_is_an_error_of_the_call(
        self, streams: tuple[Stream, Stream], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*arguments: object, **options: object) -> None:
            raise torch.cuda.OutOfMemoryError("full")

        monkeypatch.setattr(torch, "zeros", full)
        with pytest.raises(torch.cuda.OutOfMemoryError, match="full"):
            _triton._workspace(torch.device("cuda", 0), 4, 100)
        assert _triton._workspaces == {}
